"""The loop's tools: optimizer, schedule, interventions, parallel, checkpoint, run log."""
