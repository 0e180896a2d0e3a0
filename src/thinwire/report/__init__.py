"""Reports: the ledger of a run, the one JSON shape of everything that measures, and pages."""
