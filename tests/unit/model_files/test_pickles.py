"""Pickles that were allowed are scanned; what runs code is named and not loaded, what scanners miss is contained."""

from __future__ import annotations

import builtins
import functools
import gzip
import io
import operator
import os
import pickle
import pty
import runpy
import shutil
import subprocess
import zipfile

import numpy as np
import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.model_files.formats import check
from airflow_mlops.provenance.pickles import refuse_convicted, scan

pytestmark = pytest.mark.usefixtures("isolation")


class Calls:
    """A reducer: unpickling it calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def by_name(module: str, name: str, argument: str) -> bytes:
    """A call of something that need not be importable here, as an old pickle."""
    return f"c{module}\n{name}\n(S'{argument}'\ntR.".encode()


def objects() -> bytes:
    buffer = io.BytesIO()
    np.save(buffer, np.array([Calls(os.system, "true")], dtype=object))
    return buffer.getvalue()


def zipped(name: str, content: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        archive.writestr(name, content)
    return buffer.getvalue()


SYSTEM = pickle.dumps(Calls(os.system, "true"))
GADGETS = {
    "os.system": SYSTEM,
    "subprocess": pickle.dumps(Calls(subprocess.Popen, ["true"])),
    "eval": pickle.dumps(Calls(builtins.eval, "1+1")),
    "exec": pickle.dumps(Calls(builtins.exec, "import os")),
    "getattr chain": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system")),
    "runpy": pickle.dumps(Calls(runpy.run_path, "/tmp/x.py")),
    "pty": pickle.dumps(Calls(pty.spawn, "/bin/true")),
    "methodcaller": pickle.dumps(Calls(operator.methodcaller, "system", "true")),
    "partial": pickle.dumps(functools.partial(os.system, "true")),
    "rmtree": pickle.dumps(Calls(shutil.rmtree, "/nowhere")),
    "torch.load": by_name("torch", "load", "/tmp/x"),
    "torch storage": by_name("torch.storage", "_load_from_bytes", "x"),
    "torch inductor": by_name("torch._inductor.codecache", "compile_file", "x"),
    "torch jit": by_name("torch.jit.unsupported_tensor_ops", "execWrapper", "x"),
    "numpy testing": by_name("numpy.testing._private.utils", "runstring", "x"),
    "numpy f2py": by_name("numpy.f2py.crackfortran", "getlincoef", "x"),
    "pip": by_name("pip", "main", "install"),
    "timeit": by_name("timeit", "timeit", "x"),
    "idlelib": by_name("idlelib.pyshell", "ModifiedInterpreter.runcode", "x"),
    "dunder path": by_name("sklearn", "base.__builtins__.eval", "1"),
    "code object": by_name("types", "CodeType", "x"),
    "in gzip": gzip.compress(SYSTEM),
    "in npy": objects(),
    "in zip": zipped("weights.bin", SYSTEM),
    "in zip in gzip": gzip.compress(zipped("a.pkl", SYSTEM)),
    "in torch": zipped("m/data.pkl", SYSTEM),
    "damaged": SYSTEM[:-2],
    "two": pickle.dumps({"a": 1}) + SYSTEM,
}


@pytest.fixture(scope="module")
def all_findings(tmp_path_factory):
    """One scan of a folder with every gadget: the sandbox starts once."""
    folder = tmp_path_factory.mktemp("gadgets")
    for name, content in GADGETS.items():
        (folder / f"{name}.pkl").write_bytes(content)
    found = scan(folder)
    return folder, {name: [f for f in found if f.path.startswith(f"{name}.pkl")] for name in GADGETS}


@pytest.mark.parametrize("name", GADGETS)
def test_a_gadget_is_convicted_and_named(all_findings, name):
    folder, findings = all_findings
    with pytest.raises(InvalidInputError, match=rf"would run code: {name}\.pkl.*It was not loaded"):
        refuse_convicted(findings[name], str(folder))


def test_an_archive_in_an_archive_is_refused_even_where_pickles_are_allowed(model):
    folder = model("pickled")
    (folder / "more.pkl").write_bytes(zipped("archive/inner.zip", zipped("a.pkl", SYSTEM)))
    with pytest.raises(InvalidInputError, match=r"no allowed format: more\.pkl .*inner\.zip"):
        check(folder, allow_pickle=True)


def test_every_scanner_is_on_record(all_findings):
    _, findings = all_findings
    assert {finding.scanner for finding in findings["os.system"] if finding.convicts} == {
        "imports",
        "fickling",
        "modelscan",
    }


def test_known_scanners_alone_would_let_some_pass(all_findings):
    """Why the list of imports and the sandbox are there: if this ever fails, the scanners have become better."""
    _, findings = all_findings
    missed = [name for name, found in findings.items() if not any(f.convicts for f in found if f.scanner != "imports")]
    assert missed


def test_an_honest_model_is_not_convicted(model):
    found = scan(model("pickled"))
    refuse_convicted(found, "here")
    assert {finding.scanner for finding in found} == {"fickling", "modelscan"}


def test_a_model_without_pickles_has_no_findings(model):
    assert scan(model("ubj")) == []
