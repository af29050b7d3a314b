"""Reports: measured rows next to published rows of the same family, atomic writing, escaped text."""

from __future__ import annotations

import base64
import csv
import html
import json
import re
from collections.abc import Callable, Sequence
from dataclasses import asdict
from io import BytesIO
from pathlib import Path
from typing import Any

import pytest
from dalle_zoo_eval import report, sweeps
from dalle_zoo_eval.comparison import read_results
from dalle_zoo_eval.documents import Bullets, Heading, Paragraph, Table, to_html, to_markdown, write_document
from dalle_zoo_eval.metrics import METRICS
from dalle_zoo_eval.plots import Line, line_figure
from dalle_zoo_eval.protocol import find_protocol
from dalle_zoo_eval.report import write_report
from dalle_zoo_eval.sweeps import MARK
from PIL import Image

from dalle_zoo.cli.main import main
from dalle_zoo.registry import UnknownNameError
from dalle_zoo.results import ResultError, read_result, scores_of

NASTY = '<script>alert("x")</script> a|b $x$ _y_'
ALL_RADII = (0, 1, 2, 4, 8)


def score(metric: str, value: float, family: str = "dmgan", **changes: Any) -> dict[str, Any]:
    base = {"metric": metric, "family": family, "blur": 0, "candidates": 1, "value": value, "samples": 30000}
    return {**base, "reference_samples": 30000, **changes}


def made_up(scores: Sequence[dict[str, Any]], *, protocol: str = "coco-30k", name: str = "model-a") -> dict[str, Any]:
    return {
        "protocol": json.loads(json.dumps(asdict(find_protocol(protocol)))),
        "source": {"kind": "model", "name": name, "weights_sha256": {"prior/model.safetensors": "ab"}},
        "groups": {
            "all": {
                "samples": 40504, "captions": 30000, "expected_captions": 30000, "captions_sha256": "ef",
                "dataset": {"name": "coco:val2014", "sha256": "cd", "items": 40504, "excluded": 0},
            }
        },
        "metrics": {name: METRICS.spec(name).record() for name in METRICS},
        "extractors": {"dmgan": {"sha256": "12", "input": 299}},
        "selfcheck": [{"name": "against itself", "found": 1e-9, "expected": "at most 1e-06", "passed": True}],
        "scores": list(scores),
        "speed": {"images_per_second": 12.5},
        "left_out": ["clip_score: the network clip was left out"],
        "versions": {"torch": "2.13"}, "device": "cpu", "date": "2025-01-01",
    }  # fmt: skip


BY_BLUR = [score("fid", 25.0 + r, blur=r, interval=[24.0 + r, 26.5 + r], at_infinity=23.25 + r) for r in ALL_RADII] + [
    score("is", 20.0 - r, "inception-2015", blur=r, std=0.5, reference_samples=None) for r in ALL_RADII
]

Put = Callable[..., Path]


def summary(paths: Sequence[Path]) -> str:
    """Returns only the tables, as the command prints them."""
    return report.summary(read_results(paths))


@pytest.fixture
def put(tmp_path: Path) -> Put:
    """Writes a result file and returns its path."""

    def write(result: Any, folder: str = "one") -> Path:
        path = tmp_path / folder / "result.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(result if isinstance(result, str) else json.dumps(result))
        return path

    return write


@pytest.fixture
def lines(monkeypatch: pytest.MonkeyPatch) -> list[Line]:
    """Records the lines of all figures instead of plotting them, which takes most of the time of a report."""
    seen: list[Line] = []
    monkeypatch.setattr(sweeps, "line_figure", lambda lines, **_: seen.extend(lines) or b"")
    return seen


def section(text: str, heading: str) -> str:
    """Markdown from a heading of level 2 to the next one."""
    return text.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def cells(text: str, system: str) -> list[list[str]]:
    """Cells of all table rows of a system; measured ones are bold."""
    table = [[c.strip() for c in re.split(r"(?<!\\)\|", line)[1:-1]] for line in text.splitlines() if line[:1] == "|"]
    return [row for row in table if row[0].strip("*") == system]


def test_report_is_complete(put: Put, tmp_path: Path) -> None:
    files = write_report([put(made_up(BY_BLUR))], tmp_path / "out")
    assert [path.name for path in files] == [
        "report.md", "report.html", "fid-blur-dmgan.png", "fid-candidates-dmgan.png", "is-blur-inception-2015.png",
        "is-candidates-inception-2015.png",
    ]  # fmt: skip
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == sorted(path.name for path in files)
    for path in files[2:]:
        with Image.open(path) as image:
            assert (image.format, image.width > 800, image.height > 400) == ("PNG", True, True)
    text = files[0].read_text()
    assert text.count("](") == len(files) - 2  # each figure once
    for path in files[2:]:
        assert f"]({path.name})" in text
    page = files[1].read_text()
    embedded = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(data) for data in embedded] == [path.read_bytes() for path in files[2:]]
    assert not re.search(r'(?:src|href)="(?!data:)', page), "the page needs another file"
    for fact in ("12.5", "against itself", "at most 1e-06", "left out: clip", "30,000, against 30,000", "sha256"):
        assert fact in text
        assert fact in page


@pytest.mark.usefixtures("lines")
def test_marks_are_explained_next_to_their_table(put: Put) -> None:
    text = summary([put(made_up(BY_BLUR))])
    fid, inception = section("\n" + text, "FID, dmgan"), section("\n" + text, "Inception score, inception-2015")
    assert "in brackets its 95 % bootstrap interval; n → ∞ the value extrapolated to infinitely many samples." in fid
    assert "Below a measured value: ± the standard deviation over parts of the samples." in inception
    assert "Below a measured value" not in summary([put(made_up([score("fid", 25.0)]))])
    assert "standard deviation" in summary([put(made_up([score("kid", 0.5, "inception-2015", std=0.1)]))])


def test_distance_of_too_few_samples_is_marked(put: Put, lines: list[Line]) -> None:
    few = [score("frechet", 9.0, "clip", samples=300, rank_deficient=True)]
    text = summary([put(made_up(few))])
    assert cells(text, "model-a")[0][4] == "9.000 † ‡"
    assert "‡ no more samples than features: the covariance is rank-deficient and the distance far too high" in text
    assert all("‡" in line.label for line in lines if line.measured)
    assert "‡" not in summary([put(made_up([score("frechet", 9.0, "clip", samples=300)]))])
    with pytest.raises(ResultError, match="rank_deficient must be true or false, got 'yes'"):
        summary([put(made_up([score("fid", 9.0, rank_deficient="yes")]))])


@pytest.mark.usefixtures("lines")
def test_closest_training_images_are_listed(put: Put, tmp_path: Path) -> None:
    pairs = [{"sample": 3, "training": "a/b", "similarity": 0.975}, {"sample": 1, "training": "c", "similarity": 0.5}]
    result = made_up(BY_BLUR) | {"memorization": {"network": "clip", "share_above": 0.5, "closest": pairs}}
    text = write_report([put(result)], tmp_path / "out")[0].read_text()
    assert "| sample | nearest training image | cosine |\n|---|---|---|\n| 3 | a/b | 0.975 |\n| 1 | c | 0.5 |" in text
    assert "share\\_above | 0.5" in text
    assert "similarity" not in text
    assert "{" not in text


def test_equal_results_give_equal_files(put: Put, tmp_path: Path) -> None:
    path = put(made_up(BY_BLUR))
    first, second = write_report([path], tmp_path / "a"), write_report([path], tmp_path / "b")
    assert [p.read_bytes() for p in first] == [p.read_bytes() for p in second]


@pytest.mark.usefixtures("lines")
def test_measured_rows_are_listed_with_published_rows_of_same_family(put: Put, tmp_path: Path) -> None:
    both = [*BY_BLUR, score("fid", 20.0, "inception-2015")]
    text = write_report([put(made_up(both))], tmp_path / "out")[0].read_text()
    dmgan, modern = section(text, "FID, dmgan"), section(text, "FID, inception-2015")
    measured = cells(dmgan, "model-a")[0]
    assert measured[4] == r"25.00 \[24.00, 26.50\] n → ∞ 23.25"
    assert measured[-2] == "30,000, against 30,000"
    figure = next(row for row in cells(dmgan, "DALL-E 12 B") if "figure 9(a)" in row[-1])
    assert figure[2:9] == ["original", "512", "28.5", "28.9", "46.6", "85.3", "87.1"]
    assert "± 0.4" in figure[-1]
    assert cells(modern, "Imagen")[0][4] == "7.27"
    assert not cells(modern, "DALL-E 12 B")
    assert not cells(dmgan, "Imagen")
    for wrong in ("17.89", "XMC-GAN", "14.7 "):  # rejected; of unknown families
        assert wrong not in text
    scores = section(text, "Inception score, inception-2015")
    assert cells(scores, "model-a")[0][4] == "20.00 ± 0.50"
    assert cells(scores, "LAFITE")[0][4] in ("32.34", "26.02")


@pytest.mark.usefixtures("lines")
def test_candidates_curve_matches_figure_9c(put: Put, tmp_path: Path) -> None:
    curve = [score("fid", 40.0 - n, candidates=n) for n in (1, 2, 4)]
    text = write_report([put(made_up(curve))], tmp_path / "out")[0].read_text()
    by_blur, by_candidates = section(text, "FID, dmgan").split("### FID by candidates")
    assert cells(by_candidates, "model-a")[0][3:6] == ["39.00", "38.00", "36.00"]
    assert cells(by_candidates, "DALL-E 12 B")[0][3] == "34.63"
    assert "N = 512" in by_candidates
    assert cells(by_blur, "model-a")[0][3:5] == ["4", "36.00"]
    assert "34.63" not in by_blur


@pytest.mark.usefixtures("lines")
def test_deduplicated_scores_are_listed_with_deduplicated_ones(put: Put, tmp_path: Path) -> None:
    text = write_report([put(made_up(BY_BLUR, protocol="coco-30k-dedup"))], tmp_path / "out")[0].read_text()
    rows = cells(section(text, "FID, dmgan"), "DALL-E 12 B")
    assert "27.5" in {row[4] for row in rows}
    assert "28.5" not in {row[4] for row in rows}
    assert cells(text, "model-a")[0][2] == "without overlaps"


def test_other_number_of_samples_is_marked(put: Put, tmp_path: Path, lines: list[Line]) -> None:
    few = made_up([score("fid", 60.0, blur=r, samples=100) for r in ALL_RADII], name="few")
    text = write_report([put(made_up(BY_BLUR)), put(few, "two")], tmp_path / "out")[0].read_text()
    fid = section(text, "FID, dmgan")
    assert cells(fid, "few")[0][4] == f"60.00 {MARK}"
    assert cells(fid, "few")[0][-2] == "100 samples instead of 30,000, against 30,000"
    assert MARK not in cells(fid, "model-a")[0][4]
    assert f"{MARK} not comparable" in fid
    marked = {line.label: line.comparable for line in lines if line.measured}
    assert "DALL-E 12 B, best of 512" in {line.label for line in lines}
    assert marked == {"few (100 samples instead of 30,000: not comparable)": False, "model-a": True}


@pytest.mark.usefixtures("lines")
def test_smaller_protocol_does_not_make_scores_comparable(put: Put, tmp_path: Path) -> None:
    small = made_up([score("fid", 60.0, samples=100)])
    small["groups"]["all"]["expected_captions"] = 100
    text = write_report([put(small)], tmp_path / "out")[0].read_text()
    assert cells(text, "model-a")[0][4] == f"60.00 {MARK}"


@pytest.mark.parametrize(("captions", "marked"), [(500, False), (600, True), (0, True)])
@pytest.mark.usefixtures("lines")
def test_number_of_unique_captions_decides_comparability(
    put: Put, tmp_path: Path, captions: int, marked: bool
) -> None:
    birds = made_up([score("fid", 60.0, samples=500)], protocol="cub")
    birds["groups"]["all"]["expected_captions"] = (
        captions  # 0: images without captions, whose right number nobody knows
    )
    text = write_report([put(birds)], tmp_path / "out")[0].read_text()
    assert (MARK in cells(text, "model-a")[0][4]) == marked


def test_protocol_without_published_scores_has_no_marks(put: Put, tmp_path: Path) -> None:
    own = made_up([score("frechet", 3.5, "mobilenet", samples=7)], protocol="folder")
    own["groups"]["all"]["expected_captions"] = 0
    own["source"]["kind"] = "images"
    files = write_report([put(own)], tmp_path / "out")
    text = files[0].read_text()
    assert len(files) == 2  # one point is no line
    assert MARK not in text
    assert "| Fréchet distance, mobilenet | 3.500 |" in section(text, "Fréchet distance")
    assert "FID" not in text.split("## What was measured")[0]


@pytest.mark.usefixtures("lines")
def test_names_are_escaped(put: Put, tmp_path: Path) -> None:
    hostile = made_up(BY_BLUR, name=NASTY)
    hostile["left_out"] = ["<img src=x onerror=alert(1)>"]
    hostile["versions"] = {"<b>": "<i>"}
    markdown, page, *_ = write_report([put(hostile)], tmp_path / "out")
    body = page.read_text()
    assert html.escape(NASTY) in body
    for text in (body, markdown.read_text()):
        assert not re.search(r"<(?:script|b>|i>|img src=x)", text)
    assert cells(
        markdown.read_text(), r"&lt;script&gt;alert(\"x\")&lt;/script&gt; a\|b \$x\$ \_y\_".replace('\\"', '"')
    )


@pytest.mark.usefixtures("lines")
def test_equal_names_are_numbered(put: Put, tmp_path: Path) -> None:
    text = summary([put(made_up(BY_BLUR)), put(made_up(BY_BLUR), "two")])
    assert cells(text, "model-a (1)")
    assert cells(text, "model-a (2)")
    assert "![" not in text


@pytest.mark.usefixtures("lines")
def test_sheets_are_included(put: Put, tmp_path: Path) -> None:
    sheets = [tmp_path / "one/samples.png", tmp_path / "two/samples.png"]
    result = read_results([put(made_up(BY_BLUR))])
    for sheet in sheets:
        sheet.parent.mkdir(exist_ok=True)
        Image.new("RGB", (30, 20), "teal").save(sheet)
    files = report.write_report_of(result, tmp_path / "out", sheets=sheets)
    assert files[-2:] == [tmp_path / "out/samples.png", tmp_path / "out/samples-2.png"]
    assert files[-1].read_bytes() == sheets[1].read_bytes()
    assert "](samples.png)" in (text := files[0].read_text())
    assert "](samples-2.png)" in text


def changed(path: str, value: Any) -> dict[str, Any]:
    result = made_up(BY_BLUR, name="model-b")
    *parts, last = path.split("/")
    place: Any = result
    for part in parts:
        place = place[int(part) if part.isdigit() else part]
    place[last] = value
    return result


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        ("protocol/name", "cub", "differ in protocol.name: 'coco-30k' and 'cub'"),
        ("groups/all/dataset/sha256", "00", "differ in groups.all.dataset.sha256: 'cd' and '00'"),
        ("groups/all/dataset/excluded", 3, "differ in groups.all.dataset.excluded: 0 and 3"),
        ("groups/all/dataset/exclusions_sha256", "00", "differ in groups.all.dataset.exclusions_sha256: None and"),
        ("protocol/image/crop", "none", "differ in protocol.image"),
        (
            "protocol/groups/all/metrics/2/options/splits",
            5,
            "differ in options of is: {'splits': 10} and {'splits': 5}",
        ),
        ("extractors/dmgan/sha256", "13", "differ in sha256 of dmgan: '12' and '13'"),
    ],
)
def test_incompatible_results_raise(put: Put, tmp_path: Path, path: str, value: Any, message: str) -> None:
    one, two = put(made_up(BY_BLUR)), put(changed(path, value), "two")
    with pytest.raises(ResultError, match=message) as caught:
        write_report([one, two], tmp_path / "out")
    assert str(one) in str(caught.value)
    assert str(two) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("lines")
def test_results_with_other_sampling_are_compatible(put: Put) -> None:
    assert cells(summary([put(made_up(BY_BLUR)), put(changed("protocol/sampling/candidates", 8), "two")]), "model-b")


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ("{", "is not valid JSON"),
        ("[]", "must contain a JSON object, got list"),
        ({"protocol": {}, "model": {}}, "has no source: expected a result file of dalle-zoo eval"),
        (made_up([]), "holds no score"),
        (made_up([score("fdi", 1.0)]), "score 1: unknown metric 'fdi'. Did you mean 'fid'"),
        (made_up([score("fid", 1.0, "mobilenet")]), "a FID must be of inception-2015 or dmgan, got 'mobilenet'"),
        (made_up([score("fid", float("nan"))]), "is not valid JSON: it has the number NaN"),
        (made_up([score("fid", 1.0, samples=0)]), "samples must be an integer of at least 1, got 0"),
        (made_up([score("fid", 1.0, interval=[1.0])]), "interval must be two numbers"),
        (made_up([{"metric": "fid"}]), "score 1: .*missing"),
        (made_up([score("fid", 1.0), score("fid", 2.0)]), "is repeated"),
        (changed("groups/all/dataset/sha256", None), "groups.all.dataset.sha256 must be text, got 'None'"),
        (changed("selfcheck", [{"name": "halves", "passed": False}]), r"the self-check failed \(halves\)"),
    ],
)
def test_wrong_result_file_raises_with_its_name(put: Put, tmp_path: Path, result: Any, message: str) -> None:
    path = put(result)
    with pytest.raises(ResultError, match=message) as caught:
        write_report([path], tmp_path / "out")
    assert str(path) in str(caught.value)
    assert not (tmp_path / "out").exists()


@pytest.mark.usefixtures("lines")
def test_wrong_arguments_raise(put: Put, tmp_path: Path) -> None:
    path = put(made_up(BY_BLUR))
    with pytest.raises(ResultError, match="no result file is given"):
        write_report([], tmp_path / "out")
    with pytest.raises(ResultError, match="is given twice"):
        write_report([path, path], tmp_path / "out")
    with pytest.raises(ResultError, match="is missing"):
        write_report([tmp_path / "none.json"], tmp_path / "out")
    with pytest.raises(ResultError, match="out must be a folder"):
        write_report([path], path)
    with pytest.raises(ResultError, match="cannot be read as a PNG file"):
        report.write_report_of(read_results([path]), tmp_path / "out", sheets=[path])
    with pytest.raises(UnknownNameError, match="birds"):
        write_report([put(changed("protocol/published", ["birds"]), "two")], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_unknown_fields_of_a_score_are_ignored(put: Put) -> None:
    result = read_result(put(made_up([score("fid", 1.5, fit={"slope": 3.0})])))
    assert [s.value for s in scores_of(result)] == [1.5]


# ---------------------------------------------------------------- the command


@pytest.mark.usefixtures("lines")
def test_report_is_written_next_to_result(put: Put, capsys: pytest.CaptureFixture[str]) -> None:
    path = put(made_up([score("clip_score", 0.25, "clip")]))
    Image.new("RGB", (8, 8)).save(path.parent / "samples.png")
    assert main(["report", str(path)]) == 0
    assert capsys.readouterr().out.splitlines() == [str(path.with_name(f"report.{form}")) for form in ("md", "html")]
    text = path.with_name("report.md").read_text()
    assert "|  | model-a |" in text
    assert "| CLIP score | 0.2500 |" in text
    assert "(samples.png)" in text


@pytest.mark.usefixtures("lines")
def test_several_results_share_tables(put: Put, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    paths = [put(made_up([score("clip_score", value, "clip")], name=name), name) for name, value in SYSTEMS.items()]
    assert main(["report", *map(str, paths)]) == 2
    assert "give --out DIR" in capsys.readouterr().err
    assert main(["report", *map(str, paths), "--out", str(tmp_path / "both")]) == 0
    text = (tmp_path / "both/report.md").read_text()
    assert "|  | some | another |" in text
    assert "| CLIP score | 0.2500 | 0.5000 |" in text


SYSTEMS = {"some": 0.25, "another": 0.5}


# ---------------------------------------------------------------- its parts


def test_figures_accept_any_name() -> None:
    names = ["_hidden", "$x$ and $", "木", "long " * 20]
    lines = [Line(label=name, points={1: 2.0, 512: 3.0}, intervals={1: (1.0, 2.5)}, measured=True) for name in names]
    lines += [Line(label=name, points={1: 1.0, 2: 2.0}, measured=False) for name in names * 3]
    for logarithmic in (False, True):
        png = line_figure(lines, title="$t$", score="s", axis="a", logarithmic=logarithmic)
        with Image.open(BytesIO(png)) as image:
            assert image.width == 1045
            assert 505 <= image.height <= 506  # versions of matplotlib round in different ways
    with pytest.raises(ValueError, match="at least one line"):
        line_figure([], title="t", score="s", axis="a")
    with pytest.raises(ValueError, match="at least one line"):
        line_figure([Line(label="x", points={}, measured=True)], title="t", score="s", axis="a")


def test_document_escapes_names_that_are_not_utf8(tmp_path: Path) -> None:
    for file in write_document([Paragraph("caf\udce9.png")], tmp_path):
        assert r"caf\udce9.png" in file.read_text(encoding="utf-8").replace("\\\\", "\\")


def test_documents_are_rendered_as_markdown_and_html() -> None:
    blocks = [
        Heading(1, "A & B"),
        Paragraph("one\ntwo"),
        Bullets([]),
        Bullets(["x*y*"]),
        Table(["a", "b"], [["1", "2\n<3>"]], frozenset({0})),
    ]
    assert to_markdown(blocks) == (
        "# A &amp; B\n\none two\n\n- x\\*y\\*\n\n| a | b |\n|---|---|\n| **1** | 2 &lt;3&gt; |\n"
    )
    page = to_html(blocks)
    assert "<title>A &amp; B</title>" in page
    assert '<tr class="strong"><td>1</td><td>2<br><small>&lt;3&gt;</small></td></tr>' in page
    assert "<ul>\n<li>x*y*</li>\n</ul>" in page
    assert page.count("<ul>") == 1


def test_formats_for_print(put: Put, tmp_path: Path) -> None:
    """LaTeX without a preamble and figures as PDF, CSV with all digits and published rows, names of systems."""
    forms = ("latex", "csv")
    files = write_report([put(made_up(BY_BLUR))], tmp_path / "out", forms=forms, names=["a_b & 50 %"])
    names = [path.name for path in files]
    assert names[:2] == ["report.tex", "scores.csv"]
    assert "fid-blur-dmgan.pdf" in names
    assert "fid-blur-dmgan.png" in names
    assert (tmp_path / "out/fid-blur-dmgan.pdf").read_bytes().startswith(b"%PDF")
    text = files[0].read_text()
    assert r"\textbf{a\_b \& 50 \%}" in text
    assert r"\includegraphics[width=\linewidth]{fid-blur-dmgan.pdf}" in text
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") >= 1
    assert r"\resizebox{\linewidth}{!}{%" in text  # published rows are wider than a page
    assert "digitised" not in text  # the columns of sources are for the screen
    assert "What was measured" not in text
    rows = list(csv.DictReader(files[1].read_text().splitlines()))
    own = [row for row in rows if row["source"] == "measured"]
    assert [float(row["value"]) for row in own] == [score["value"] for score in made_up(BY_BLUR)["scores"]]
    assert {row["system"] for row in own} == {"a_b & 50 %"}
    assert any("figure 9(a)" in row["source"] for row in rows)
    again = write_report([put(made_up(BY_BLUR))], tmp_path / "again", forms=forms, names=["a_b & 50 %"])
    assert [path.read_bytes() for path in files] == [path.read_bytes() for path in again]
    with pytest.raises(ResultError, match="there are 1 results and 2 names"):
        write_report([put(made_up(BY_BLUR))], tmp_path / "out", names=["one", "two"])


def test_identical_sets_have_no_plot(put: Put, tmp_path: Path) -> None:
    flat = made_up([{**score("fid", 1e-9, "dmgan"), "blur": radius} for radius in (0, 1)])
    flat["protocol"]["published"] = []
    assert len(write_report([put(flat)], tmp_path / "out")) == 2
