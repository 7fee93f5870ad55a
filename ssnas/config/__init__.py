"""The parameters of a run: what is accepted (`schema`), and how they are read (`load`)."""
