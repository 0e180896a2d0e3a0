"""Reports: the ledger of a run, the JSON format of all measurements, and HTML pages."""
