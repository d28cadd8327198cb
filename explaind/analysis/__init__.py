"""Questions: from ledgers and runs to small named tables, each with its formula and its source."""
