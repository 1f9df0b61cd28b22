"""What every stage needs: errors, typed configuration, artifacts, progress, processes."""
