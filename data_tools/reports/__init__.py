"""Reports on datasets: their content, their damage, and what a run reads of them."""
