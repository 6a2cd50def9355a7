"""Where requests enter: admission, placement, the stream's ledger, migration."""
