"""How fast, against what: one file per question, each answered beside its baseline in the same run."""
