"""Arrays to pictures, videos and pages."""
