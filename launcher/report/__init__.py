"""What a run has to show: the live view while it trains, the summary at its end and the report page."""
