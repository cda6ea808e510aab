"""What may be loaded is known by its content; everything else is refused by name."""

from __future__ import annotations

import builtins
import bz2
import gzip
import io
import json
import lzma
import os
import pickle
import runpy
import shutil
import struct
import zipfile
import zlib

import numpy as np
import pytest

from airflow_mlops.exceptions import InvalidInputError
from airflow_mlops.model_files.formats import check, inspect


class Calls:
    """A reducer: unpickling it calls ``function(*arguments)``."""

    def __init__(self, function, *arguments):
        self.call = (function, arguments)

    def __reduce__(self):
        return self.call


def bomb(protocol: int = 4) -> bytes:
    return pickle.dumps(Calls(os.system, "true"), protocol)


def formats(folder) -> dict[str, str]:
    return {file.path: file.format for file in inspect(folder)}


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return buffer.getvalue()


def saved(function, *arguments, **options) -> bytes:
    buffer = io.BytesIO()
    function(buffer, *arguments, **options)
    return buffer.getvalue()


def objects() -> bytes:
    return saved(np.save, np.array([Calls(os.system, "true")], dtype=object))


def adds_weights(*names: str):
    """An ONNX model; with names, one that says that its weights are in these files."""
    from onnx import TensorProto, helper, numpy_helper

    values = numpy_helper.from_array(np.random.default_rng(0).random(5000).astype("float32"), "w")
    ends = [helper.make_tensor_value_info(name, TensorProto.FLOAT, [5000]) for name in "xy"]
    outside = []
    for name in names:
        tensor = TensorProto(name=f"in {name}", data_type=TensorProto.FLOAT, dims=[1])
        tensor.data_location = TensorProto.EXTERNAL
        tensor.external_data.add(key="location", value=name)
        outside.append(tensor)
    node = helper.make_node("Add", ["x", "w"], ["y"])
    return helper.make_model(helper.make_graph([node], "g", ends[:1], ends[1:], [values, *outside]))


class TestAllowed:
    def test_models_as_mlflow_saves_them(self, model):
        assert formats(model("ubj"))["model.ubj"] == "xgboost-ubjson"
        assert formats(model("json", "b"))["model.json"] == "xgboost-json"
        code = formats(model("code", "c"))
        assert code["model_code.py"] == "python" and code["MLmodel"] == "mlmodel"
        for folder in ("b", "c", "model"):
            check(model.__closure__[1].cell_contents / folder)

    def test_lightgbm(self, tmp_path, rows):
        lightgbm = pytest.importorskip("lightgbm")
        data = lightgbm.Dataset(rows, (rows["a"] > 20).astype(int))
        lightgbm.train({"objective": "binary", "verbose": -1}, data, 2).save_model(tmp_path / "any.name")
        assert formats(tmp_path) == {"any.name": "lightgbm-text"}

    @pytest.mark.parametrize(
        "words", [b"carrier\norigin\ndest\n", b"cat\ndog\nbird\n", b"iata\nicao\n", b"cos\nsin\ntan\n"]
    )
    def test_a_list_of_words_that_reads_like_a_pickle(self, tmp_path, words):
        (tmp_path / "features.txt").write_bytes(words)
        assert formats(tmp_path) == {"features.txt": "text"}

    def test_safetensors(self, tmp_path):
        from safetensors.numpy import save_file

        save_file({"w": np.arange(6.0), "b": np.zeros(2)}, tmp_path / "weights")
        assert formats(tmp_path) == {"weights": "safetensors"}

    def test_onnx_and_its_weights(self, tmp_path):
        onnx = pytest.importorskip("onnx")
        made = adds_weights()
        onnx.save(made, str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.weights")
        assert formats(tmp_path) == {"m.onnx": "onnx", "m.weights": "onnx-weights"}
        made = onnx.load(str(tmp_path / "m.onnx"), load_external_data=False)
        made.graph.initializer[0].external_data[0].value = "../../etc/passwd"
        (tmp_path / "m.onnx").write_bytes(made.SerializeToString())
        with pytest.raises(InvalidInputError, match=r"takes weights from '\.\./\.\./etc/passwd', outside"):
            inspect(tmp_path)

    def test_onnx_with_weights_beside_it_that_mlflow_loads_as_such(self, tmp_path):
        onnx = pytest.importorskip("onnx")
        onnx.save(adds_weights(), str(tmp_path / "m.onnx"), save_as_external_data=True, location="m.onnx.data")
        (tmp_path / "MLmodel").write_text("flavors: {python_function: {loader_module: mlflow.onnx}}")
        assert {file.path: file.format for file in check(tmp_path)} == {
            "MLmodel": "mlmodel",
            "m.onnx": "onnx",
            "m.onnx.data": "onnx-weights",
        }

    @pytest.mark.torch
    def test_torch_weights_and_programs(self, tmp_path):
        torch = pytest.importorskip("torch", reason="needs PyTorch")
        net = torch.nn.Linear(2, 1)
        torch.save(net.state_dict(), tmp_path / "weights")
        torch.export.save(torch.export.export(net, (torch.ones(3, 2),)), tmp_path / "program.pt2")
        assert formats(tmp_path) == {"program.pt2": "torch-export", "weights": "torch-weights"}
        torch.save(net, tmp_path / "weights")
        assert formats(tmp_path)["weights"] == "pickle"


PICKLES = {
    **{f"protocol {n}": bomb(n) for n in range(6)},
    "protocol 0, damaged after the call": bomb(0)[:-1] + b"\xff",
    "a call of what is not installed": b"cnowhere\nrun\n(S'x'\ntR.",
    "an import": b"cantigravity\nfly\n.",
    "builtins": pickle.dumps(Calls(builtins.eval, "1")),
    "getattr": pickle.dumps(Calls(getattr, Calls(__import__, "os"), "system")),
    "runpy": pickle.dumps(Calls(runpy.run_path, "/x")),
    "gzip": gzip.compress(bomb()),
    "bz2": bz2.compress(bomb()),
    "xz": lzma.compress(bomb()),
    "zlib": zlib.compress(bomb()),
    "npy": objects(),
    "npz": zipped({"a.npy": saved(np.save, np.ones(2)), "b.npy": objects()}),
    "gzipped npy": gzip.compress(objects()),
    "torch": zipped({"m/data.pkl": bomb(2), "m/version": b"3\n"}),
    "torch with another file": zipped({"m/data.pkl": pickle.dumps({}), "m/code/x.py": b"1"}),
    "zip": zipped({"weights.bin": bomb()}),
    "skops": zipped({"schema.json": b"{}", "a.npy": saved(np.save, np.ones(2))}),
    "by name": None,
}


class TestRefused:
    @pytest.mark.parametrize(
        ("loader", "kind"),
        [
            *(("mlflow.pyfunc.model", kind) for kind in PICKLES),
            # Of what has no mark of its own nothing tells it from numbers, and this loader reads them as such.
            *(("mlflow.onnx", kind) for kind in ("protocol 0", "protocol 4", "gzip", "npy", "torch", "by name")),
        ],
    )
    def test_a_pickle_that_onnx_calls_its_weights(self, model, kind, loader):
        pytest.importorskip("onnx")
        folder = model()
        name = "model.pkl" if kind == "by name" else "w.bin"
        (folder / name).write_bytes(PICKLES[kind] or b"harmless")
        (folder / "x.onnx").write_bytes(adds_weights(name, "MLmodel").SerializeToString())
        text = (folder / "MLmodel").read_text()
        (folder / "MLmodel").write_text(text.replace("loader_module: mlflow.xgboost", f"loader_module: {loader}"))
        with pytest.raises(InvalidInputError, match=rf"is pickled .*{name.replace('.', '[.]')}"):
            check(folder)

    def test_a_description_that_onnx_calls_its_weights(self, model):
        pytest.importorskip("onnx")
        folder = model()
        (folder / "x.onnx").write_bytes(adds_weights("MLmodel").SerializeToString())
        text = (folder / "MLmodel").read_text()
        (folder / "MLmodel").write_text(text.replace("loader_module: mlflow.xgboost", "loader_module: os"))
        with pytest.raises(InvalidInputError, match="load the model with 'os'"):
            check(folder)

    def test_what_onnx_calls_its_weights_in_a_model_that_is_not_loaded_as_onnx(self, model):
        pytest.importorskip("onnx")
        folder = model()
        (folder / "x.onnx").write_bytes(adds_weights("w.bin").SerializeToString())
        (folder / "w.bin").write_bytes(bytes(range(256)))
        with pytest.raises(InvalidInputError, match=r"no allowed format: w\.bin"):
            check(folder)

    @pytest.mark.parametrize("kind", PICKLES)
    @pytest.mark.parametrize("name", ["model.safetensors", "notes.txt"])
    def test_a_pickle_in_whatever_it_hides(self, model, kind, name):
        folder = model()
        name = "model.joblib" if kind == "by name" else name
        (folder / name).write_bytes(PICKLES[kind] or b"harmless")
        with pytest.raises(InvalidInputError, match=f"is pickled .*{name}.*Save the model in a format"):
            check(folder)
        assert name in [file.path for file in check(folder, allow_pickle=True) if file.pickled]

    @pytest.mark.parametrize(
        "content",
        [
            b"\x89HDF\r\n\x1a\n" + bytes(30),
            b"\x7fELF" + bytes(30),
            saved(np.save, np.ones(3)),
            zipped({"a.npy": saved(np.save, np.ones(2))}),
            zipped({"code.so": b"\x7fELF"}),
            zipped({"m/archive_format": b"pt2", "m/data/aotinductor/model/x.txt": b"1"})[:-30],
            struct.pack("<Q", 2) + b"{}" + b"more than the header says",
            b"{L" + bytes(20),
            b"\x08\x01garbage",
            bytes(100),
        ],
        ids=["hdf5", "elf", "npy", "npz", "zip", "broken zip", "safetensors+", "ubjson", "protobuf", "zeros"],
    )
    def test_what_is_not_known(self, model, content):
        folder = model()
        (folder / "blob").write_bytes(content)
        with pytest.raises(InvalidInputError, match=r"holds files of no allowed format: blob \("):
            check(folder, allow_pickle=True)

    def test_a_program_with_machine_code(self, tmp_path):
        members = {"m/archive_format": b"pt2", "m/data/aotinductor/model/model.so": b"\x7fELF"}
        (tmp_path / "m.pt2").write_bytes(zipped(members))
        with pytest.raises(InvalidInputError, match=r"holds m/data/aotinductor/model/model\.so"):
            check(tmp_path)

    def test_two_members_of_one_name(self, tmp_path):
        with pytest.warns(UserWarning, match="Duplicate name"):
            buffer = io.BytesIO()
            with zipfile.ZipFile(buffer, "w") as archive:
                archive.writestr("m/data.pkl", pickle.dumps({}))
                archive.writestr("m/data.pkl", bomb())
        (tmp_path / "m").write_bytes(buffer.getvalue())
        with pytest.raises(InvalidInputError, match="two members of the archive have one name"):
            check(tmp_path)

    @pytest.mark.parametrize("offsets", [[8, 12], [0, "x"], [0, 4, 12], [0]])
    def test_safetensors_with_a_hole_or_no_offsets(self, tmp_path, offsets):
        header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": offsets}}).encode()
        (tmp_path / "w").write_bytes(struct.pack("<Q", len(header)) + header + bytes(12))
        with pytest.raises(InvalidInputError, match=r"no allowed format: w"):
            check(tmp_path)

    def test_a_booster_that_is_cut_off_or_followed_by_something(self, model):
        folder = model()
        whole = (folder / "model.ubj").read_bytes()
        for spoiled in (whole[:-1], whole + b"\x00"):
            (folder / "model.ubj").write_bytes(spoiled)
            with pytest.raises(InvalidInputError, match=r"model\.ubj"):
                check(folder)

    @pytest.mark.parametrize(
        ("old", "new", "message"),
        [
            ("loader_module: mlflow.xgboost", "loader_module: os", "load the model with 'os'"),
            ("loader_module: mlflow.xgboost", "loader_module: mlflow.sklearn", "'mlflow.sklearn'.*only data"),
            ("model_class: xgboost.core.Booster", "model_class: os.abort", "make a 'os.abort'"),
            ("flavors:", "tastes:", "lists no flavors"),
            ("flavors:", "flavors: [", "no YAML"),
        ],
    )
    def test_a_description_that_has_other_code_imported(self, model, old, new, message):
        folder = model()
        text = (folder / "MLmodel").read_text()
        assert old in text
        (folder / "MLmodel").write_text(text.replace(old, new, 1))
        with pytest.raises(InvalidInputError, match=message):
            check(folder)

    def test_a_folder_that_is_none(self, tmp_path):
        with pytest.raises(InvalidInputError, match="there is no model folder"):
            check(tmp_path / "absent")
        with pytest.raises(InvalidInputError, match="is empty"):
            check(tmp_path)

    def test_what_leads_out_of_the_folder(self, model, tmp_path):
        folder = model()
        (folder / "more").symlink_to(shutil.copytree(folder, tmp_path / "other"))
        with pytest.raises(InvalidInputError, match=r"more of the model in .* is a symbolic link"):
            check(folder)
