"""HTML that fetches nothing: tables, a stacked timeline, one page; no data types of its own."""
