"""What `segvit demo` trains, and the page that it writes about it."""
