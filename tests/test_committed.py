"""What is committed: notebooks as they were run, pictures that are current, numbers that agree, a tidy house."""

import ast
import base64
import json
import re
import statistics
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
NOTEBOOKS = sorted(ROOT.glob("*.ipynb"))
PACKAGE = ROOT / "influence_functions"
MODULES = [
    ROOT / "notebook_support.py",
    *PACKAGE.rglob("*.py"),
    *ROOT.glob("explorer/*.py"),
    *ROOT.glob("tools/*.py"),
    *ROOT.glob("benchmarks/*.py"),
]
MACHINE_PATH = re.compile(r"(?<![\w.])/(?:root|home|work|tmp|Users|usr)/|[A-Z]:\\\\")


def cells(path: Path, kind: str) -> list[dict]:
    return [cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == kind]


def sources(path: Path, kind: str) -> str:
    return "\n".join("".join(cell["source"]) for cell in cells(path, kind))


def outputs(path: Path) -> list[dict]:
    return [output for cell in cells(path, "code") for output in cell["outputs"]]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.name)
class TestNotebook:
    def test_it_was_run_from_top_to_bottom(self, path):
        code = cells(path, "code")
        assert [cell["execution_count"] for cell in code] == list(range(1, len(code) + 1))
        assert all("".join(cell["source"]).strip() for cell in cells(path, "code") + cells(path, "markdown"))

    def test_it_holds_no_error_no_warning_and_no_progress_bar(self, path):
        for output in outputs(path):
            assert output["output_type"] != "error"
            assert output.get("name") != "stderr"
            assert "Warning" not in json.dumps(output)
            assert "it/s]" not in json.dumps(output)

    def test_it_holds_no_widget_and_no_path_of_a_machine(self, path):
        assert "widgets" not in json.loads(path.read_text(encoding="utf-8"))["metadata"]
        texts = [json.dumps({k: v for k, v in o.get("data", o).items() if k != "image/png"}) for o in outputs(path)]
        assert not [text for text in texts if MACHINE_PATH.search(text)]

    def test_it_is_small_enough_for_github_and_its_cells_for_a_reader(self, path):
        assert path.stat().st_size <= 1_000_000
        assert all(len(cell["source"]) <= 40 for cell in cells(path, "code"))
        assert all(len(line.rstrip("\n")) <= 100 for cell in cells(path, "code") for line in cell["source"])

    def test_it_imports_nothing_else_of_ours(self, path):
        imports = re.findall(r"^\s*(?:import|from) (\w+)", sources(path, "code"), re.M)
        ours = {
            file.stem
            for file in ROOT.rglob("*.py")
            if not any(part.startswith(".") for part in file.relative_to(ROOT).parts)
        } - {"notebook_support", "influence_functions", *(file.stem for file in PACKAGE.rglob("*.py"))}
        assert not ours & set(imports)

    def test_it_was_run_on_the_real_data_in_full(self, path):
        text = json.dumps(outputs(path), ensure_ascii=False)
        assert "THIS IS NOT CIFAR-10" not in text
        assert "50,000" in text


def test_every_picture_is_the_one_its_notebook_shows():
    shown = {
        base64.b64decode(o["data"]["image/png"])
        for path in NOTEBOOKS
        for o in outputs(path)
        if "image/png" in o.get("data", {})
    }
    pictures = list((ROOT / "images").glob("*.png"))
    assert pictures
    assert not [file.name for file in pictures if file.read_bytes() not in shown]


def test_every_picture_and_file_that_a_page_names_exists():
    for page in [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *NOTEBOOKS]:
        text = page.read_text(encoding="utf-8") if page.suffix == ".md" else sources(page, "markdown")
        for name in re.findall(r"\]\(([\w./-]+)\)|src=\"([\w./-]+)\"", text):
            assert (ROOT / "".join(name)).exists(), f"{page.name} names {''.join(name)}"
    assert "images/torched-pie.png" in (ROOT / "README.md").read_text(encoding="utf-8")


def test_the_pictures_the_readme_needs_are_wide_enough_and_not_too_wide():
    from PIL import Image

    for file in (ROOT / "images").glob("*.png"):
        width, height = Image.open(file).size
        sharp = file.stat().st_size < 60_000  # a chart of at most 7 inches at 200 dpi, else 100
        assert 150 <= width <= (1_400 if sharp else 700), file.name
        assert height >= 150, file.name


def results() -> dict:
    return json.loads((ROOT / "data/results.json").read_text(encoding="utf-8"))


def test_the_numbers_of_the_readme_come_from_the_results():
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    found_out = results()
    student, retraining, mislabels = (found_out[name] for name in ("student", "retraining", "mislabels"))
    signs, exact, lds = (retraining[name] for name in ("removal_signs", "exact", "lds"))
    early, stable, full = retraining["lds_checkpoints"], retraining["stability"], retraining["all_images"]["change"]
    methods = {row["method"]: row for row in found_out["quality"]["rows"]}
    one = (
        "ours",
        "ours, EK-FAC",
        "ours, loss",
        "kronfluence EK-FAC",
        "kronfluence EK-FAC, margin",
        "pyDVL Nyström, rank 50",
    )
    five = ("ours", "kronfluence EK-FAC, margin", "dattri TRAK", "captum TracInCP")
    named = (*one, "dattri TRAK", *(f"{name}, 5 checkpoints" for name in five))
    named = (*named, "ours, 10 models", "dattri TRAK, 10 models")
    found = mislabels["detection"]["any class"]
    second = mislabels["second_look"]["look-alikes"]
    scores = ("loss, on the way", "loss", "margin", "out of fold", "influence, on the way", "self-influence")
    scores = (*scores, "influence", "random")

    corrected = "Benjamini–Hochberg < 0.05"

    def tried(kind: str) -> str:
        rows = [row for name, row in signs.items() if name.startswith(kind)]
        seen, of, clear = (sum(row[name] for row in rows) for name in ("sign as predicted", "of", corrected))
        return f"in {seen} of {of} trials, {clear} of them clear"

    def holm(kind: str) -> int:
        return sum(row["Holm < 0.05"] for name, row in signs.items() if name.startswith(kind))

    mean_lds = {name: statistics.mean(found) for name, found in early["of_each"].items()}

    def held(trainings: int) -> list[float]:
        return [stable[f"50,000, five checkpoints, {trainings}, {kind}"] for kind in ("helpful", "harmful")]

    for text in (
        f"| {' · '.join('{:.0%}'.format(found[score]['found'][0]) for score in scores)} |",
        *("{lds:.3f} [{low:.3f}, {high:.3f}] | {seconds:.1f} s | {peak_gb:.1f} GB".format(**methods[n]) for n in named),
        " · ".join("{:.2f} ± {:.2f}".format(*second[score]) for score in ("influence", "loss")),
        f"the most helpful of 50,000 images in {student['twins']['first']:.0%}",
        f"Of {student['twins']['count']} test images",
        f"For {100 * student['harm_by_the_rival'][0]:.1f} ± ",
        tried("helpful"),
        tried("harmful"),
        *(
            "{:+.1f} ± {:.1f} nats, {:+.1f} ± {:.1f} nats".format(*pair["helpful"], *pair["harmful"]).replace("-", "−")
            for pair in full.values()
        ),
        f"tests; Holm: {holm('helpful')})",
        f"(Holm: {holm('harmful')})",
        f"built by hand | {student['exact_small']['correlation']:.4f} |",
        f"| Pearson {exact['pearson']['all']:.4f} |",
        *("{:.3f} [{:.3f}, {:.3f}]".format(*lds["margin"][which]) for which in (0, -1)),
        f"at most {lds['ceiling']:.2f}",
        f"the finished models: {mean_lds['the finished model']:.3f}) | 5,000 images",
        f"5,000 images | {mean_lds['five checkpoints']:.3f} |",
        "each of ten trainings | 5,000 images | {:.3f} [{:.3f}, {:.3f}] |".format(*early["margin"][-1]),
        *("{:.0%} of the most helpful, {:.0%} of the most harmful".format(*held(size)) for size in (1, 3)),
        f"{student['test_accuracy']:.1%}",
        "has {:.0%} of the helpful and {:.0%} of the harmful ones in its top 10".format(*held(1)),
        f"the loss finds {found['loss, on the way']['found'][0]:.0%} of them",
        f"and influence {found['influence, on the way']['found'][0]:.0%}, each averaged over five epochs",
    ):
        assert text in readme, text


def test_what_readme_says_of_the_chapters_comes_from_the_results():
    readme, tuned = (ROOT / "README.md").read_text(encoding="utf-8"), results()["finetuning"]
    flips, errors, words = results()["stress_test"]["flipped"], results()["label_errors"], ("no", "one", "two", "three")
    most = {(row["left out"], row["share"]): row["actual ÷ foretold"] for row in tuned["groups"]}
    for text in (
        f"Pearson {tuned['pearson']['cg']['all pairs']:.4f} over 300 refits",
        f"the loss rises {most['most helpful', 0.1]:.1f} times as much as foretold",
        "flip {:.0%} of 60 chosen test images".format(flips["pixels, by influence, 10"]),
        "at random {:.0%}.".format(flips["pixels, at random, 10"]),
        "hold {aggregate:.0f}% of the errors of a majority of three (random flips: {flipped:.0f}%)".format(
            **results()["human_labels"]["five_commonest_pairs"]
        ),
        "holds {best:.0%} of the errors of a majority of three, the loss finds {loss:.0%}, cleanlab's score "
        "{out of fold:.0%} (both with `Net`), influence averaged over five epochs {influence, on the way:.0%}.".format(
            best=errors["steps"]["aggregate"]["ConvNet-8, out of fold, over both"]["found"][0],
            **{name: pair["found"][0] for name, pair in errors["scores"]["aggregate"].items()},
        ),
        f"test set {words[errors['test']['by_eye']['wrong']]} of the fifty most suspicious labels",
    ):
        assert text in readme, text


def test_the_figures_of_speed_come_from_the_results():
    page = (ROOT / "docs/running.md").read_text(encoding="utf-8")
    speed, sizes = results()["speed"], (12_500, 25_000, 50_000)
    ten, many = speed["engine"]["50000 x 10"], speed["engine"]["50000 x 200"]
    five = speed["checkpoints 50000 x 10"]
    for text in (
        f"| {speed['plain']['median']:.1f} s |",
        f"| {ten['median']:.1f} s | {ten['peak']:.1f} GB | {ten['median'] / speed['plain']['median']:.1f} × the plain",
        "{:.1f}, {:.1f} and {:.1f} s of scoring".format(*(speed["engine"][f"{n} x 10"]["score"] for n in sizes)),
        "{:.1f}, {:.1f} and {:.1f} GB for".format(*(speed["engine"][f"{n} x 10"]["peak"] for n in sizes)),
        f"| {many['median']:.1f} s |",
        f"| {speed['package']['scaled_seconds']:.0f} s |",
        f"{ten['package_ratio']:,} ×",
        f"{many['package_ratio']:,} ×",
        f"| {five['median']:.1f} s | {five['peak']:.1f} GB | {five['to_one_model']:.1f} × one model |",
        *(
            "| {name} | {n:,} | {plain:.0f} s | {whole:.0f} s | {peak:.1f} GB | {score_to_plain:.1f} | "
            "{whole_to_plain:.1f} | {whole_50000:.1f} |".format(name=name, **row)
            for name, row in speed["large"].items()
        ),
    ):
        assert text in page, text
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"in {many['median']:.1f} s on 2 CPU cores, a test image in {many['package_ratio']:,} ×" in readme


def test_no_cifar_file_cache_or_environment_is_committed():
    listed = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    if not listed:
        pytest.skip("not a git checkout")
    assert not [
        name for name in listed if re.search(r"batch|\.venv|__pycache__|\.pyc$|checkpoints|^build/|cifar.*tar", name)
    ]
    limits = {
        "data/net.safetensors": 2_000_000,  # five checkpoints and the finished model
        "data/resnet-20-eight-classes.safetensors": 2_000_000,  # two of them, and the finished model
        "docs/index.html": 2_000_000,  # the explorer's lists
        **{f"docs/explorer-train-{k}.jpg": 1_500_000 for k in range(6)},
    }
    files = [name for name in listed if (ROOT / name).exists()]
    assert all((ROOT / name).stat().st_size < limits.get(name, 1_000_000) for name in files)


# ── the code ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    "command",
    [
        ["ruff", "check", "."],
        ["ruff", "format", "--check", "."],
        ["ruff", "format", "--check", "--line-length", "100", *map(str, NOTEBOOKS)],
        ["mypy", "influence_functions", "explorer", "notebook_support.py", "tools", "benchmarks"],
    ],
)
def test_the_linters_find_nothing(command):
    done = subprocess.run([sys.executable, "-m", *command], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def functions(path: Path) -> list[ast.FunctionDef]:
    return [node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.FunctionDef)]


@pytest.mark.parametrize("path", MODULES, ids=lambda path: path.name)
def test_functions_are_short_and_take_few_parameters(path):
    for node in functions(path):
        body = node.body[1:] if ast.get_docstring(node) else node.body
        lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
        parameters = [a.arg for a in node.args.args + node.args.kwonlyargs if a.arg not in {"self", "cls"}]
        assert lines <= 30, f"{node.name} has {lines} lines"
        assert len(parameters) <= 6, f"{node.name} takes {len(parameters)} parameters"


def test_a_section_of_the_module_calls_none_below_it():
    text = (ROOT / "notebook_support.py").read_text(encoding="utf-8")
    borders = [number for number, line in enumerate(text.splitlines(), 1) if line.startswith("# ║ ")]
    section = lambda line: sum(border <= line for border in borders)  # noqa: E731
    tree = ast.parse(text)
    home = {n.name: section(n.lineno) for n in tree.body if isinstance(n, (ast.FunctionDef, ast.ClassDef))}
    wrong = [
        f"line {node.lineno} uses {node.id}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Name) and home.get(node.id, 0) > section(node.lineno)
    ]
    assert not wrong


# ── the tools ────────────────────────────────────────────────────────────────────────────────────────────────────


def tiny_notebook(path: Path, *sources: str) -> Path:
    code = [
        {"cell_type": "code", "id": f"c{i}", "metadata": {}, "execution_count": None, "outputs": [], "source": s}
        for i, s in enumerate(sources)
    ]
    title = {"cell_type": "markdown", "id": "t", "metadata": {}, "source": "# A title\n\nwith $x^2$ in it"}
    path.write_text(json.dumps({"cells": [title, *code], "metadata": {}, "nbformat": 4, "nbformat_minor": 5}))
    return path


def execute(*arguments: str | Path) -> subprocess.CompletedProcess:
    command = [sys.executable, ROOT / "tools/execute.py", *arguments]
    return subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, timeout=120)


def test_executing_shows_progress_keeps_bars_out_and_writes_a_page_that_loads_nothing(tmp_path):
    source = tiny_notebook(
        tmp_path / "a.ipynb", "import sys; print('hello', 6 * 7)", "sys.stderr.write('\\r 50%|##  |'); 1 + 1"
    )
    done = execute(source, "--to", tmp_path / "out", "--html")
    assert done.returncode == 0, done.stderr
    assert "A title" in done.stdout
    assert "hello 42" in done.stdout
    book = json.loads((tmp_path / "out/a.ipynb").read_text())
    assert [o["output_type"] for c in book["cells"] if c["cell_type"] == "code" for o in c["outputs"]] == [
        "stream",
        "execute_result",
    ]
    page = (tmp_path / "out/a.html").read_text()
    assert "<msup><mi>x</mi><mn>2</mn></msup>" in page  # the formula, not taken apart
    assert "cdnjs" not in page
    assert not re.search(r"(?:src|href)=\"(?:https?:)?//", page)


def test_a_failing_cell_fails_the_run_and_overwrites_nothing(tmp_path):
    source = tiny_notebook(tmp_path / "a.ipynb", "1 / 0")
    before = source.read_text()
    done = execute(source)
    assert done.returncode == 1
    assert "ZeroDivisionError" in done.stderr
    assert source.read_text() == before


def test_readme_gives_the_scores_of_the_residual_network():
    rows = {row["method"]: row for row in results()["quality ResNet-8"]["rows"]}
    text = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for words, name in {
        "`ekfac_kernel` foretells retraining with a linear datamodeling score of": "ours, EK-FAC + kernel",
        "`kernel` with": "ours, kernel",
        "kronfluence's EK-FAC with": "kronfluence EK-FAC, margin",
        "our `ekfac` with": "ours, EK-FAC",
        "dattri's TRAK with": "dattri TRAK",
        "the gradient product with": "gradient product, margin",
        "`ekfac_kernel` of three trainings with": "ours, EK-FAC + kernel, 3 models",
    }.items():
        assert f"{words} {rows[name]['lds']:.3f} in {rows[name]['seconds']:.0f} s" in text, name
    assert f"all {len(rows)} rows" in text
    assert all(row["ahead_low"] > 0 for row in rows.values() if "ahead" in row), "who is ahead of all others?"
