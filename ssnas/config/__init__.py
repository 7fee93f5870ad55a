"""The parameters of a run: their declaration (`schema`) and their files (`load`, `systems`)."""
