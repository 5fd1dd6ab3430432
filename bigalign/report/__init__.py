"""The HTML page of a run: `bigalign report`."""
