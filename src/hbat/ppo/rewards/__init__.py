"""What completions are scored with: functions and reward models."""
