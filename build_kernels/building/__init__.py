"""From specs to a published set of artifacts: plan, compile, describe, publish."""
