"""Pictures, the closing summary and the HTML page of one run; `papers` has the papers' tables."""
