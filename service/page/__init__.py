"""The page at /: one image, what base and defence say of it, and why."""

from service.page.routes import add_page

__all__ = ["add_page"]
