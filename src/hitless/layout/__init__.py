"""Types of maps as the C compiler laid them out: read, compared, converted. Pure Python over bytes."""
