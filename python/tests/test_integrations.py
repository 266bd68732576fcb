"""The integrations cost nothing until they are used, and say what they need."""

import importlib
import subprocess
import sys

import pytest

import microbatch as mb


def test_importing_microbatch_imports_no_trainer():
    code = "import sys, microbatch; assert not {'transformers', 'lightning'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(("name", "package"), [("lightning", "lightning"), ("transformers", "'transformers")])
def test_a_package_that_is_missing_is_named_with_the_command_that_installs_it(name, package, monkeypatch):
    module = f"microbatch.integrations.{name}"
    monkeypatch.delitem(sys.modules, module, raising=False)
    for imported in (name, "lightning.pytorch"):
        monkeypatch.setitem(sys.modules, imported, None)
    with pytest.raises(ImportError, match=f"{module} needs the package {name}: pip install {package}"):
        importlib.import_module(module)


def test_a_version_of_transformers_with_another_trainer_is_refused(monkeypatch):
    monkeypatch.delitem(sys.modules, "microbatch.integrations.transformers", raising=False)
    monkeypatch.setattr(importlib.import_module("transformers"), "__version__", "4.57.6")
    with pytest.raises(ImportError, match="needs transformers 5, and this is 4.57.6: pip install"):
        importlib.import_module("microbatch.integrations.transformers")


def test_an_integration_is_there_by_name():
    assert mb.integrations.transformers.Trainer.__mro__[1].__module__.startswith("transformers.")
    assert {"lightning", "transformers"} <= set(dir(mb.integrations))
    with pytest.raises(AttributeError, match="has no attribute 'keras'; it has lightning and transformers"):
        mb.integrations.keras  # noqa: B018
