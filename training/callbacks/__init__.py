"""What happens next to a training step: evaluation, preview, spikes, throughput, watchdog."""
