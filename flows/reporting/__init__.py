"""What the pages of `posttrain report` show: each module reads one kind of artifact into plain views."""
