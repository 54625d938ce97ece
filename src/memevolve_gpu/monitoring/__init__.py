"""What operators see: events and the health report."""
