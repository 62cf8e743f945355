"""Palettes, overlays, legends, heat maps and the report's building blocks."""

import base64
import io
import math
import re

import numpy as np
import pytest
from PIL import Image

from segvit.pictures import report, visualize
from segvit.pictures.palette import _appearance, class_palette

NAMES = ("road", "sky", "car", "tree")


@pytest.fixture
def image() -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (24, 36, 3), dtype=np.uint8)


@pytest.fixture
def labels() -> np.ndarray:
    labels = np.zeros((24, 36), np.int64)
    labels[:, 20:] = 3
    labels[2:5, 2:7] = 2
    labels[-1] = 255
    return labels


def test_palette_is_distinct_and_a_prefix_of_a_longer_one():
    palette = class_palette(150)
    assert palette.shape == (150, 3) and palette.dtype == np.uint8
    assert len(np.unique(palette, axis=0)) == 150
    np.testing.assert_array_equal(class_palette(19), palette[:19])


@pytest.mark.parametrize(("classes", "smallest"), [(8, 0.3), (20, 0.2), (150, 0.08)])
def test_palette_keeps_colours_apart_for_every_kind_of_vision(classes, smallest):
    """Distance over three OKLab appearances; a random palette of 150 comes to about 0.02."""
    seen = _appearance(class_palette(classes).astype(float))
    distance = np.linalg.norm(seen[:, None] - seen[None], axis=-1)[~np.eye(classes, dtype=bool)]
    assert distance.min() > smallest


@pytest.mark.parametrize("classes", [0, -3])
def test_palette_refuses(classes):
    with pytest.raises(ValueError, match=f"num_classes is {classes}"):
        class_palette(classes)


def test_palette_of_more_classes_than_colours():
    """As many classes as a model may have: each colour once, then all of them again."""
    palette = class_palette(1 << 15)
    colours = len(np.unique(palette, axis=0))
    assert palette.shape == (1 << 15, 3) and colours > 2000
    np.testing.assert_array_equal(palette[colours:], palette[:-colours])


def test_appearance_of_known_colours():
    """White and black are the same for everyone; red and green of one lightness meet for a deuteranope."""
    seen = _appearance(np.array([[255, 255, 255], [0, 0, 0]])).reshape(2, 3, 3)
    np.testing.assert_allclose(seen[0], [[1, 0, 0]] * 3, atol=2e-3)
    np.testing.assert_allclose(seen[1], 0, atol=1e-9)
    red, green = _appearance(np.array([[200, 90, 60], [128, 128, 62]])).reshape(2, 3, 3)
    normal, _, deuteranopic = np.linalg.norm(red - green, axis=1)
    assert deuteranopic < 0.5 * normal


def test_overlay_blends_known_labels_only(image, labels):
    palette = class_palette(4)
    painted = visualize.overlay(image, labels, palette, alpha=0.5)
    assert painted.shape == image.shape and painted.dtype == np.uint8
    inside = ~visualize.borders(labels)
    known = inside & (labels != 255)
    expected = 0.5 * image[known] + 0.5 * palette[labels[known]]
    np.testing.assert_allclose(painted[known], expected, atol=0.51)
    np.testing.assert_array_equal(painted[inside & (labels == 255)], image[inside & (labels == 255)])


def test_overlay_limits(image, labels):
    palette = class_palette(4)
    np.testing.assert_array_equal(visualize.overlay(image, labels, palette, alpha=0), image)
    inside = ~visualize.borders(labels) & (labels != 255)
    solid = visualize.overlay(image, labels, palette, alpha=1)
    np.testing.assert_array_equal(solid[inside], palette[labels[inside]])


def test_borders_are_where_labels_change():
    labels = np.array([[0, 0, 1], [0, 0, 1], [2, 2, 2]])
    expected = np.array([[0, 1, 0], [1, 1, 1], [0, 0, 0]], dtype=bool)
    np.testing.assert_array_equal(visualize.borders(labels), expected)
    assert not visualize.borders(np.zeros((3, 3), int)).any()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"labels": np.zeros((5, 5), int)}, r"labels has shape \(5, 5\)"),
        ({"labels": np.zeros((24, 36))}, "labels is float64"),
        ({"image": np.zeros((24, 36, 3))}, "image is float64"),
        ({"image": np.zeros((3, 24, 36), np.uint8)}, "image is uint8"),
        ({"alpha": 1.5}, "alpha is 1.5"),
    ],
)
def test_overlay_refuses(image, labels, change, message):
    arguments = {"image": image, "labels": labels, "palette": class_palette(4), **change}
    with pytest.raises(ValueError, match=message):
        visualize.overlay(**arguments)


def test_legend_lists_exactly_the_classes_present(labels):
    entries = visualize.legend_entries(labels, NAMES)
    assert [entry.name for entry in entries] == ["road", "tree", "car"]
    known = (labels != 255).sum()
    for entry in entries:
        assert entry.share == (labels == entry.index).sum() / known
    assert visualize.legend_entries(np.full((2, 2), 255), NAMES) == []


def test_legend_draws_each_present_colour_and_no_other(labels):
    palette = class_palette(4)
    pixels = np.asarray(visualize.legend(labels, NAMES, palette)).reshape(-1, 3)
    drawn = [(pixels == color).all(axis=1).sum() > 50 for color in palette]
    assert drawn == [True, False, True, True]


@pytest.mark.parametrize("classes", [1, 30, 150])
def test_legend_holds_every_row_inside_its_panel(classes):
    labels = np.arange(150 * 4).reshape(20, 30) // 4 % classes
    palette = class_palette(classes)
    panel = visualize.legend(labels, [f"class number {i}" for i in range(classes)], palette, size=(640, 200))
    assert panel.height >= 200
    drawn = {color: count for count, color in panel.getcolors(panel.width * panel.height)}
    assert all(drawn.get(tuple(color), 0) >= 100 for color in palette.tolist())


def test_overlay_with_legend_keeps_the_picture_in_its_left_part(image, labels):
    palette = class_palette(4)
    canvas = np.asarray(visualize.overlay_with_legend(image, labels, NAMES, palette, alpha=0.4))
    np.testing.assert_array_equal(canvas[:24, :36], visualize.overlay(image, labels, palette, alpha=0.4))
    assert canvas.shape[1] > 36


def test_share_formats():
    assert [visualize.format_share(s) for s in (0.5, 0.0995, 0.012, 0.0001)] == [
        "50 %",
        "10 %",
        "1.2 %",
        "<0.1 %",
    ]


def test_heat_is_brighter_where_the_map_is_larger():
    image = np.full((20, 30, 3), 90, np.uint8)
    ramp = np.linspace(-4, 4, 6)[None].repeat(4, axis=0)
    for normalize in ("sigmoid", "minmax"):
        warm = visualize.heat(image, ramp, normalize=normalize)
        assert warm.shape == image.shape and warm.dtype == np.uint8
        brightness = warm[10].astype(float).sum(axis=1)
        assert brightness[-1] > brightness[15] > brightness[0]
    # Certain: the brightest colour with a rest of the picture; nothing: mostly the picture.
    certain, nothing = (visualize.heat(image, np.full((2, 2), value))[5, 5] for value in (50.0, -50.0))
    np.testing.assert_allclose(certain, 0.85 * np.array([252, 255, 164]) + 0.15 * 90, atol=0.51)
    np.testing.assert_allclose(nothing, 0.35 * np.array([10, 8, 40]) + 0.65 * 90, atol=0.51)
    # Minmax does not see a change of offset, the sigmoid does.
    moved = visualize.heat(image, ramp + 3, normalize="minmax")
    np.testing.assert_allclose(moved, visualize.heat(image, ramp, normalize="minmax"), atol=1)
    assert (visualize.heat(image, ramp + 3) != visualize.heat(image, ramp)).any()


def test_heat_survives_constant_and_extreme_maps(image):
    for value in (0.0, 1e4, -1e4):
        for normalize in ("sigmoid", "minmax"):
            assert visualize.heat(image, np.full((3, 3), value), normalize=normalize).shape == image.shape
    with pytest.raises(ValueError, match="normalize is 'max'"):
        visualize.heat(image, np.zeros((3, 3)), normalize="max")


def test_similarity_picture_has_a_row_for_each_class_and_a_column_for_each_stage(image):
    rng = np.random.default_rng(1)
    stages = [rng.normal(size=(4, 3, 4)) for _ in range(3)]

    def size(stages, rows):
        chosen = [stage[:rows] for stage in stages]
        return visualize.similarity_picture(image, chosen, sum(chosen), NAMES[:rows]).size

    base = size(stages, 1)
    assert size(stages, 2)[0] == base[0] and size(stages, 2)[1] - base[1] >= 160
    assert base[0] - size(stages[:2], 1)[0] >= 240
    with pytest.raises(ValueError, match="class_names has 0 names"):
        size(stages, 0)
    with pytest.raises(ValueError, match="class_names has 4 names"):
        visualize.similarity_picture(image, stages, sum(stages)[:3], NAMES)


def embedded_pictures(html: str) -> list[np.ndarray]:
    found = re.findall(r'src="data:image/[a-z]+;base64,([^"]+)"', html)
    return [np.asarray(Image.open(io.BytesIO(base64.b64decode(data)))) for data in found]


def test_report_escapes_texts_and_embeds_pictures(image):
    evil = '<script>alert("x")</script>'
    html = report.page(
        evil,
        evil,
        [
            report.tiles([report.Tile(evil, evil, evil)]),
            report.heading(evil, evil),
            report.facts([(evil, evil)]),
            report.table([evil], [[evil]]),
            report.bars([report.Bar(evil, (1, 2, 3), 0.5, evil)], (evil, evil, evil)),
            report.class_legend([evil], np.zeros((1, 3), np.uint8)),
            report.picture_grid([(evil, evil)], [(evil, evil, [report.picture(image, evil, evil, scale=2)])]),
            report.line_chart([(0, 0), (1, 1)], x_label=evil, y_label=evil, dots=True),
            report.preformatted(evil),
        ],
        evil,
    )
    assert "<script" not in html and '="<' not in html
    (picture,) = embedded_pictures(html)
    assert picture.shape == (48, 72, 3)


def test_chart_places_points_on_its_axes():
    chart = report.line_chart([(0, 0), (50, math.nan), (100, 10)], x_label="step", y_label="loss", y_top=10)
    (points,) = re.findall(r'points="([^"]*)"', chart)
    assert points == "48.0,238.0 506.0,22.0"  # the axes' corners; the missing point is left out


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 100, [0, 20, 40, 60, 80, 100]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
        (0, 1234, [0, 250, 500, 750, 1000]),
    ],
)
def test_ticks_are_round(low, high, expected):
    assert report._ticks(low, high) == pytest.approx(expected)


def test_bars_show_missing_values_as_missing():
    html = report.bars([report.Bar("a", (0, 0, 0), math.nan), report.Bar("b", (0, 0, 0), 0.25)], ("", "", ""))
    assert "nan" not in html and "25.0 %" in html and "width:25.0%" in html


@pytest.mark.parametrize("number", [1, 3, 30, 150])
def test_confusion_picture(number):
    matrix = np.zeros((number, number), np.int64)
    matrix[0, -1] = 7
    picture = np.asarray(visualize.confusion_picture(matrix, [f"class {i}" for i in range(number)]))
    cell = max(5, min(40, 960 // number))
    corner = picture[-9 - number * cell :, -9 - number * cell :]  # and the last line of what is left of it
    first, last = corner[4, 4], corner[4, -8 - 4]
    assert first.tolist() == (last if number == 1 else visualize._HEAT[0]).tolist()
    assert last.tolist() == visualize._HEAT[-1].tolist()
    if number > 1:  # a class without pixels
        assert corner[number * cell - 4, 4].tolist() == [255, 255, 255]
    with pytest.raises(ValueError, match="matrix has shape"):
        visualize.confusion_picture(matrix, ["one", "too", "many"] * number)
