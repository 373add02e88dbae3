from tests.storage.conftest import database, module_database, new_database, postgres, template

__all__ = ["database", "module_database", "new_database", "postgres", "template"]
