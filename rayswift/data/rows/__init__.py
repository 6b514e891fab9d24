"""Any schema → standard rows (``{"messages": [...]}``): columns, messages, and the rules that join them."""
