"""Which documents of a source are worth training on: quality filters, deduplication, decontamination."""
