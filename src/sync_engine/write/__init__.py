"""The write flow: admit, log, make visible, batch, flush, settle."""
