"""Anatomy of the synthetic scans: how a case of each body region is drawn.

Anatomy is data: tables of balls and tubes in the millimetres of a reference patient, x to the patient's
right, y anterior, z superior (RAS+ of nibabel). A case scales and warps that patient, paints the tables in
order and adds noise. Every drawing function returns the image, the labels (uint8) and the voxel spacing in mm.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy.interpolate import CubicSpline
from scipy.ndimage import distance_transform_edt, gaussian_filter, map_coordinates

WARP_REACH = 20.0  # mm, how far the warp can move a point: the margin of every bounding box


class Ball(NamedTuple):
    """Ellipsoid: centre and radii in mm; tilt turns it in the coronal plane (degrees, top towards +x)."""

    centre: tuple[float, float, float]
    radii: tuple[float, float, float]
    tilt: float = 0.0

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and the highest corner of a box around the shape, in mm."""
        return np.subtract(self.centre, max(self.radii)), np.add(self.centre, max(self.radii))

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Return the approximate signed distance in mm (negative inside) of points [3, ...]."""
        x, y, z = (p - c for p, c in zip(points, self.centre, strict=True))
        sin, cos = np.sin(np.radians(self.tilt)), np.cos(np.radians(self.tilt))
        q = np.stack([cos * x - sin * z, y, sin * x + cos * z])
        radii = np.asarray(self.radii, np.float32).reshape(3, *[1] * (q.ndim - 1))
        level = np.sqrt(((q / radii) ** 2).sum(0)) + 1e-3
        return level * (level - 1) / (np.sqrt(((q / radii**2) ** 2).sum(0)) + 1e-4)


class Tube(NamedTuple):
    """Round tube through knots (x, y, z, radius), all in mm; the radius changes linearly between knots."""

    knots: tuple[tuple[float, float, float, float], ...]

    def box(self) -> tuple[np.ndarray, np.ndarray]:
        """Return the lowest and the highest corner of a box around the shape, in mm."""
        knots = np.asarray(self.knots)
        return (knots[:, :3] - knots[:, 3:]).min(0), (knots[:, :3] + knots[:, 3:]).max(0)

    def distance(self, points: np.ndarray) -> np.ndarray:
        """Return the signed distance in mm (negative inside) of points [3, ...]."""
        nearest = np.full(points.shape[1:], np.inf, np.float32)
        for start, end in zip(self.knots[:-1], self.knots[1:], strict=True):
            offset = [p - np.float32(s) for p, s in zip(points, start[:3], strict=True)]
            axis = np.subtract(end[:3], start[:3]).astype(np.float32)
            along = np.clip(sum(o * a for o, a in zip(offset, axis, strict=True)) / (axis @ axis), 0, 1)
            squared = sum((o - along * a) ** 2 for o, a in zip(offset, axis, strict=True))
            nearest = np.minimum(nearest, np.sqrt(squared) - (start[3] + along * (end[3] - start[3])))
        return nearest


Shapes = tuple[Ball | Tube, ...]
Case = tuple[np.ndarray, np.ndarray, np.ndarray]  # image, labels (uint8), voxel spacing in mm


def _tube(*knots: tuple[float, float, float, float]) -> Tube:
    return Tube(knots)


def _both_sides(*shapes: Ball | Tube) -> Shapes:
    """Return the shapes and their mirror images on the patient's left."""

    def mirror(shape: Ball | Tube) -> Ball | Tube:
        if isinstance(shape, Tube):
            return _tube(*((-x, y, z, r) for x, y, z, r in shape.knots))
        x, y, z = shape.centre
        return Ball((-x, y, z), shape.radii, -shape.tilt)

    return (*shapes, *map(mirror, shapes))


class Part(NamedTuple):
    """A structure of the abdomen; HU are (arterial, portal venous); label 0 does not change the label map."""

    label: int
    hu: tuple[float, float]
    shapes: Shapes
    minus: Shapes = ()  # carved out, as a hilum is
    wall: float = 0.0  # mm; deeper than this lies the content
    content: tuple[float, float] | None = None
    gas_above: float = np.inf  # y in mm: patients lie on their back, so gas collects in front
    under_diaphragm: bool = True


# fmt: off
ABDOMEN_LABELS = dict(enumerate((
    "spleen", "right kidney", "left kidney", "gallbladder", "esophagus", "liver", "stomach", "aorta",
    "inferior vena cava", "portal and splenic veins", "pancreas", "right adrenal gland", "left adrenal gland",
), start=1))
MUSCLES = _both_sides(
    _tube((30, -80, 190, 18), (33, -79, -60, 24), (30, -84, -190, 22)),  # erector spinae
    _tube((27, -42, 10, 8), (37, -38, -60, 16), (50, -22, -190, 21)),  # psoas
    _tube((56, -58, -10, 6), (66, -60, -60, 11), (68, -58, -120, 9)),  # quadratus lumborum
    _tube((14, -26, 60, 5), (13, -28, -20, 4)),  # crura of the diaphragm
)
HIPS = _both_sides(Ball((98, -38, -172), (13, 62, 76), 24))
VERTEBRAE = _both_sides(_tube((5, -46, 190, 17), (5, -46, -190, 17)))
ARCHES = _both_sides(
    _tube((2, -76, 190, 4), (2, -76, -190, 4)),
    _tube((13, -68, 190, 4.5), (13, -68, -190, 4.5)),
)
CANAL = (_tube((0, -65, 190, 8), (0, -65, -190, 8)),)
RIB_ENDS = np.array([-52, -15, 30, 55, 70, 80, 90])  # y in mm where the 12th, 11th ... rib ends
HEART = (Ball((-24, 34, 152), (60, 48, 48)),)
ABDOMEN = (  # later parts cover earlier ones
    # ascending, transverse (two halves) and descending colon
    Part(0, (60, 70), (_tube((88, 5, -190, 20), (94, 0, -100, 22), (92, 18, -38, 20)),),
         wall=3, content=(40, 60), gas_above=12),
    Part(0, (60, 70), (_tube((90, 34, -30, 16), (40, 62, -52, 17), (-30, 66, -48, 15)),),
         wall=3, content=(35, 45), gas_above=66),
    Part(0, (60, 70), (_tube((-30, 66, -48, 15), (-80, 44, -12, 16), (-103, 4, 8, 15)),),
         wall=3, content=(30, 40), gas_above=52),
    Part(0, (60, 70), (_tube((-103, 4, 8, 14), (-104, -16, -70, 13), (-88, -4, -190, 13)),),
         wall=3, content=(30, 40)),
    # liver, then the portal and hepatic veins in it
    Part(6, (72, 112), (Ball((78, 0, 48), (62, 78, 84), -6), Ball((14, 40, 76), (66, 38, 34), -14)),
         minus=(Ball((26, -8, 4), (28, 34, 34)),)),
    Part(0, (80, 150), (
        _tube((44, 14, 46, 6), (72, 14, 60, 4.5), (104, 2, 70, 2.5)),
        _tube((72, 14, 60, 4), (90, 34, 34, 2)),
        _tube((44, 14, 46, 5), (22, 40, 72, 3.5), (-8, 46, 82, 2)),
        _tube((27, -8, 100, 5), (66, 8, 94, 4), (100, -14, 76, 2)),
        _tube((27, -8, 100, 5), (44, 34, 88, 3.5), (56, 50, 64, 2)),
    )),
    Part(1, (125, 118), (Ball((-98, -28, 62), (34, 44, 46), 14),),
         minus=(Ball((-60, 4, 62), (34, 36, 40)),)),
    # kidneys: the wall is the cortex, the content the medulla
    Part(2, (185, 190), (Ball((62, -44, -24), (27, 25, 52), -12),),
         minus=(Ball((44, -34, -24), (15, 9, 22)),), wall=8, content=(95, 170)),
    Part(3, (185, 190), (Ball((-62, -44, -8), (27, 25, 52), 12),),
         minus=(Ball((-44, -34, -8), (15, 9, 22)),), wall=8, content=(95, 170)),
    Part(7, (70, 80),
         (_tube((-60, -2, 90, 31), (-66, 28, 60, 31), (-52, 52, 24, 25), (-8, 60, 2, 19), (24, 50, 4, 12)),),
         wall=4, content=(25, 30), gas_above=50),
    Part(4, (12, 8), (Ball((50, 46, 0), (14, 19, 25), 10),)),
    # duodenum
    Part(0, (70, 80), (_tube((24, 50, 4, 12), (46, 30, -4, 13), (48, 16, -48, 12), (20, 2, -64, 11)),),
         wall=3, content=(30, 40)),
    Part(11, (105, 95),
         (_tube((30, 22, -20, 14), (28, 24, 0, 15), (8, 32, 12, 10), (-30, 24, 20, 12), (-74, -6, 40, 10)),)),
    # superior mesenteric artery
    Part(0, (290, 150), (_tube((4, -6, 4, 4), (2, 20, -22, 3.5), (4, 32, -90, 3)),)),
    Part(9, (95, 145), (_tube((20, -20, -88, 11), (22, -16, -10, 12), (26, -10, 60, 12), (24, 0, 112, 12)),),
         under_diaphragm=False),
    Part(8, (300, 155),
         (_tube((-4, -16, -84, 9), (-10, -16, 20, 10), (-14, -18, 80, 11), (-20, -26, 190, 12)),),
         under_diaphragm=False),
    # iliac arteries
    Part(0, (280, 150), _both_sides(_tube((2, -16, -84, 7), (28, -18, -130, 6), (44, -8, -190, 6)))),
    Part(10, (135, 172), (
        _tube((16, 14, 6, 7.5), (32, 10, 28, 7.5), (48, 14, 48, 7)),
        _tube((16, 14, 6, 7), (-12, 12, 18, 5.5), (-42, 8, 28, 5), (-76, -12, 46, 4.5)),
        _tube((16, 14, 6, 7), (16, 28, -34, 5.5)),
    )),
    Part(5, (55, 65), (_tube((-6, -2, 190, 9), (-10, 0, 125, 9), (-22, 6, 100, 9), (-38, 4, 92, 9)),),
         wall=4.5, content=(20, 20), under_diaphragm=False),
    Part(12, (75, 85),
         (_tube((36, -22, 50, 4), (40, -30, 36, 4.6)), _tube((38, -26, 44, 3.6), (48, -34, 34, 4)))),
    Part(13, (75, 85),
         (_tube((-30, -16, 42, 4.4), (-33, -26, 30, 5)), _tube((-32, -22, 38, 4), (-44, -27, 28, 4.4)))),
)

BRAIN_LABELS = {1: "necrotic core", 2: "edema", 4: "enhancing tumour"}
CHANNELS = ("t1", "t1ce", "t2", "flair")
BACKGROUND, CSF, GREY, WHITE, DEEP_GREY, NECROSIS, EDEMA, ENHANCING = range(8)
SIGNAL = np.array((  # one row for each tissue, one column for each channel
    (0, 0, 0, 0),
    (0.24, 0.25, 1.00, 0.20),
    (0.60, 0.62, 0.62, 0.62),
    (0.86, 0.88, 0.44, 0.47),
    (0.68, 0.70, 0.54, 0.57),
    (0.36, 0.38, 0.88, 0.46),
    (0.58, 0.60, 0.80, 0.98),
    (0.60, 1.20, 0.66, 0.78),
), np.float32)
CEREBRUM = Ball((0, -4, 12), (67, 85, 60))
TEMPORAL_LOBES = _both_sides(Ball((41, 6, -19), (25, 42, 21), 8))
CEREBELLUM = (*_both_sides(Ball((23, -57, -39), (31, 31, 23), -10)), Ball((0, -54, -36), (17, 29, 24)))
BRAINSTEM = (_tube((0, -14, -6, 15), (0, -20, -38, 15), (0, -30, -68, 7)),)
DEEP_NUCLEI = _both_sides(
    Ball((11, -14, 4), (9, 15, 9)),  # thalamus
    _tube((12, 22, 8, 6), (17, -2, 16, 4), (20, -20, 16, 3)),  # caudate
    Ball((25, 5, 2), (6, 18, 11), 8),  # lentiform nucleus
)
VENTRICLES = (
    *_both_sides(
        _tube((6, 30, 6, 4), (8, 6, 16, 5.5), (14, -26, 15, 7.5), (18, -54, 6, 3.5)),
        _tube((15, -28, 13, 7), (28, -20, -10, 3), (31, 2, -18, 2.5)),
    ),
    Ball((0, -8, 0), (2.4, 13, 9)),  # third
    Ball((0, -42, -38), (7, 5, 9)),  # fourth
)

LIVER, TUMOUR = 6, 14  # labels of the abdomen; tumours are drawn for `ct_liver` alone
LIVER_LABELS = {1: "liver", 2: "cancer"}
SPLEEN_LABELS = {1: "spleen"}
ORGAN_LABELS = {1: "liver", 2: "spleen", 3: "right_kidney", 4: "left_kidney"}
ORGANS = (6, 1, 2, 3)  # their labels in the abdomen
COARSE = 1.6  # times the voxel sides of the abdomen

HIPPOCAMPUS_LABELS = {1: "Anterior", 2: "Posterior"}
HIPPOCAMPUS_FIELD = (36, 50, 37)  # mm of the reference crop, whose x points to the midline
HIPPOCAMPUS = (
    _tube((5, 10, -5, 3.5), (2, 14, -9, 5), (-3, 12, -10, 5.5), (-6, 4, -8, 5.5)),  # uncus, head
    _tube((-6, 4, -8, 5.5), (-7, -4, -3, 4.8), (-5, -11, 4, 4.4), (0, -16, 10, 3.2)),  # body, tail
)
HEAD_ENDS = 3.5  # mm; the head lies in front of this coronal plane, body and tail behind it
TEMPORAL_LOBE = (  # signal (white matter is 1) and shapes; later ones cover earlier ones
    (0.80, (Ball((3, -4, 17), (13, 15, 9)),)),  # thalamus
    (0.68, (Ball((2, 23, 0), (10, 7, 8)),)),  # amygdala
    # parahippocampal gyrus: cortex around the collateral sulcus
    (0.60, (_tube((-3, 26, -21, 4), (-4, 0, -18, 4.5), (-6, -26, -11, 4.5)),)),
    (0.15, (_tube((-3, 26, -22, 1.2), (-4, 0, -19, 1.4), (-6, -26, -12, 1.6)),)),
    # cisterns around brainstem and cerebral peduncle
    (0.10, (Ball((22, -9, -4), (15, 18, 26)), _tube((13, 26, -10, 6), (11, 14, -6, 4)))),
    (1.10, (Ball((23, -10, -4), (13, 16, 25)),)),
    # temporal horn, which opens into the atrium; choroid fissure
    (0.10, (_tube((-9, 19, -9, 2), (-12, 8, -6, 2), (-13, -4, 0, 2), (-11, -16, 8, 4), (-7, -24, 14, 6)),)),
    (0.15, (_tube((8, 6, -1, 1.5), (-2, -2, 2, 1.6), (1, -10, 9, 1.8), (5, -18, 14, 2.5)),)),
    (0.95, (_tube((-5, 6, -2, 1.2), (-8, -4, 2, 1.2), (-6, -11, 9, 1.2), (-1, -16, 13, 1.2)),)),  # fimbria
    (0.64, HIPPOCAMPUS),
    (0.40, (_tube((0, 10, -9, 0.5), (-5, 0, -5, 0.6), (-5, -9, 2, 0.5)),)),  # hippocampal sulcus
    (1.80, (_tube((11, 26, -12, 1), (10, 8, -6, 0.9), (9, -12, 2, 0.8)),)),  # posterior cerebral artery
)
# fmt: on


def _smooth_noise(rng: np.random.Generator, shape: tuple[int, ...], knots: int) -> np.ndarray:
    """Return noise [X, Y, Z] of about unit variance, smooth between `knots` points along each axis."""
    noise = rng.standard_normal((knots,) * 3).clip(-2.5, 2.5)
    for axis, size in enumerate(shape):
        spline = CubicSpline(np.arange(knots), np.eye(knots))(np.linspace(0, knots - 1, size))
        noise = np.moveaxis(np.tensordot(spline, noise, (1, axis)), 0, axis)
    return noise.astype(np.float32)


class Grid:
    """Voxel grid of a case: where its voxels lie in the reference patient, `points` [3, X, Y, Z] in mm."""

    def __init__(
        self,
        rng: np.random.Generator,
        size: tuple[int, ...],
        spacing: np.ndarray,
        middle: np.ndarray,
        warp: float,
    ) -> None:
        scale = rng.uniform(0.93, 1.05, 3)
        self.axes = [
            (m + (np.arange(n) - (n - 1) / 2) * d / s).astype(np.float32)
            for n, d, m, s in zip(size, spacing, middle, scale, strict=True)
        ]
        self.voxel = float(np.mean(spacing))
        self.points = np.stack(np.meshgrid(*self.axes, indexing="ij"))
        for point in self.points:
            point += warp * (_smooth_noise(rng, size, 5) + 0.35 * _smooth_noise(rng, size, 9))

    def distance(self, shapes: Shapes) -> np.ndarray:
        """Return the signed distance [X, Y, Z] in mm to the union of the shapes (inf far away from them)."""
        nearest = np.full(self.points.shape[1:], np.inf, np.float32)
        for shape in shapes:
            box = self.box((shape,))
            nearest[box] = np.minimum(nearest[box], shape.distance(self.points[(slice(None), *box)]))
        return nearest

    def box(self, shapes: Shapes) -> tuple[slice, ...]:
        """Return the part of the grid that the shapes may reach."""
        low = np.min([shape.box()[0] for shape in shapes], 0) - WARP_REACH
        high = np.max([shape.box()[1] for shape in shapes], 0) + WARP_REACH
        bounds = zip(self.axes, low, high, strict=True)
        return tuple(slice(*np.searchsorted(axis, (first, last))) for axis, first, last in bounds)


def _blend(volume: np.ndarray, hu: np.ndarray | float, distance: np.ndarray, voxel: float) -> None:
    """Paint inside a surface in place; a voxel that the surface cuts gets its share (partial volume)."""
    volume += np.clip(0.5 - distance / voxel, 0, 1) * (hu - volume)


def ct_abdomen(rng: np.random.Generator, tumours: bool = False, coarser: float = 1) -> Case:
    """Draw CT [X, Y, Z] in HU (int16) with the 13 organs, and with tumours in the liver if wanted.

    Args:
        rng: draws the patient.
        tumours: whether there are some.
        coarser: factor on the sides of voxels.
    """
    fat, wall, phase = rng.uniform(9, 26), rng.uniform(11, 15), rng.uniform(0, 1)
    width, between = 2 * (146 + wall + 1.25 * fat), float(rng.choice([3.0, 3.27, 3.75, 4.0, 4.5])) * coarser
    columns = int(np.clip(width / rng.uniform(2.45, 3.0), 96, 144) / coarser)
    size = (columns, columns, int(np.clip(rng.uniform(275, 300) / between, 64 / coarser, 96 / coarser)))
    spacing = np.round([width / columns, width / columns, between], 3)
    grid = Grid(rng, size, spacing, np.array([0, 0, rng.uniform(4, 16)]), 3.5)
    x, y, z = grid.points

    # Distances in mm from the abdominal cavity (a squarish ellipse with a groove behind) and from the skin.
    waist = 1 + 0.05 * np.cos((z + 40) / 38)
    back = y - 4 * np.exp(-((x / 16) ** 2)) * (y < 0)
    outside = (np.abs(x / (128 * waist)) ** 2.5 + np.abs(back / 80) ** 2.5 + 1e-6) ** 0.4
    outside = np.hypot(x, back) * (1 - 1 / outside)
    skin = outside - wall - fat * (1 + 0.3 * np.sin(2.2 * np.arctan2(np.abs(x), back)))
    table = np.abs(y + 89 + wall + 1.35 * fat - (x / 37) ** 2) - 2.5
    volume = np.full(size, -1000, np.float32)
    muscle = np.maximum(grid.distance(MUSCLES), skin + 4)
    layers = (
        (-300, np.where(np.abs(x) > 150, np.inf, table)),
        (20, skin - 3),
        (-105, skin),
        (55, outside - wall),
    )
    for hu, distance in (*layers, (-98, outside), (57, muscle)):
        _blend(volume, hu, distance, grid.voxel)
    _paint_bones(volume, grid, outside, skin)

    # Above the diaphragm, a dome on each side that dips behind and at the sides: lungs and heart.
    aside, behind = (np.abs(x) - 62) / 66, y / 80
    dome = np.where(x > 0, 122, 110) - np.where(aside > 0, 55, 16) * aside**2
    above = z - dome + np.where(y < 0, 78, 36) * behind**2
    chest = np.maximum(outside + 1, 24 - np.abs(x))
    vessels = gaussian_filter(rng.standard_normal(size, np.float32), 0.8) > 0.45
    _blend(volume, 50, np.maximum(chest, np.abs(above) - 3), grid.voxel)
    _blend(volume, -860 - 0.6 * y + 520 * vessels, np.maximum(chest, 3 - 0.6 * above), grid.voxel)
    _blend(volume, 60 + 70 * phase, grid.distance(HEART), grid.voxel)

    labels = np.zeros(size, np.uint8)
    limit = np.maximum(outside + 1, above + 3)
    for part in (*_small_bowel(rng), *ABDOMEN):
        _paint_part(volume, labels, grid, part, limit, phase, rng.normal(0, 4))
    if tumours:
        liver = labels == LIVER
        for part in _liver_tumours(rng, liver, grid, spacing):
            _paint_part(volume, labels, grid, part, np.where(liver, -np.inf, np.inf), phase, rng.normal(0, 4))
    # Noise is correlated in plane, as filtered back-projection leaves it, and weaker outside the body.
    noise = gaussian_filter(rng.standard_normal(size, np.float32), (0.7, 0.7, 0)) * rng.uniform(18, 34)
    volume = gaussian_filter(volume, 0.4) + noise * np.where(skin < 5, 1, 0.5)
    return np.clip(np.round(volume), -1024, 3071).astype(np.int16), labels, spacing


def _paint_bones(volume: np.ndarray, grid: Grid, outside: np.ndarray, skin: np.ndarray) -> None:
    """Paint spine, hip bones and ribs in place, hard (cortical) outside and softer (marrow) inside."""
    x, y, z = grid.points
    level = np.abs((z + 300) % 34 - 17)  # mm from the middle of the nearest disc, one every 34 mm
    vertebra = grid.distance(VERTEBRAE)
    bone = np.where((level < 6) | (vertebra > -3), 480, 210)
    spinous_process = np.maximum(np.maximum(np.abs(x) - 4, np.abs(y + 90) - 14), 9 - level)
    transverse_process = np.maximum(np.abs(x) - 38, np.hypot(y + 64, 14 - level) - 5)
    hips = np.maximum(grid.distance(HIPS), skin + 8)
    # Ribs lie in the wall of the trunk, 24 mm apart, and fall towards the front.
    height = z + 0.5 * (y + 75) - 28
    number = np.round(height / 24)
    rib = np.hypot(outside - 6, height - 24 * number) - 5.5
    end = RIB_ENDS[np.clip(number, 0, len(RIB_ENDS) - 1).astype(int)]
    rib[(number < 0) | (y > end) | (np.abs(x) < 16)] = np.inf
    for hu, distance in (
        (np.where(level < 4, 85, bone), vertebra),
        (520, grid.distance(ARCHES)),
        (450, spinous_process),
        (560, transverse_process),
        (15, grid.distance(CANAL)),
        (np.where(hips > -4, 620, 260), hips),
        (np.where(rib > -2.5, 620, 250), rib),
    ):
        _blend(volume, hu, distance, grid.voxel)


def _small_bowel(rng: np.random.Generator) -> list[Part]:
    """Return loops of small bowel, some with oral contrast or gas, and the vessels that lead to them."""
    parts = []
    for _ in range(30):
        middle = rng.uniform((-76, -4, -140), (64, 60, -26))
        turns = (middle + rng.uniform(-1, 1, (4, 3)) * (28, 16, 14)).tolist()
        loop = _tube(*((*turn, rng.uniform(9, 14)) for turn in turns))
        contrast = float(rng.choice([25, 40, 180]))
        gas = middle[1] + 7 if rng.random() < 0.3 else np.inf
        parts.append(Part(0, (70, 95), (loop,), wall=3, content=(contrast, contrast), gas_above=gas))
        parts.append(Part(0, (110, 120), (_tube((10, 26, -34, 1.5), (*turns[0], 1)),)))
    return parts


def _liver_tumours(rng: np.random.Generator, liver: np.ndarray, grid: Grid, spacing: np.ndarray) -> list[Part]:
    """Return one to four tumours, each with a darker middle, at least 8 mm deep in the liver [X, Y, Z] (bool)."""
    places = np.argwhere(distance_transform_edt(liver, sampling=spacing) > 8)
    parts = []
    for place in rng.choice(places, rng.integers(1, 5)):
        centre, radii = grid.points[(slice(None), *place)], rng.uniform(6, 18) * rng.uniform(0.8, 1.2, 3)
        lobe = Ball((centre + radii * rng.uniform(-0.5, 0.5, 3)).tolist(), (0.7 * radii).tolist())
        shapes = (Ball(centre.tolist(), radii.tolist()), lobe)
        parts.append(Part(TUMOUR, (46, 60), shapes, wall=rng.uniform(2, 5), content=(28, 34)))
    return parts


def _paint_part(
    volume: np.ndarray,
    labels: np.ndarray,
    grid: Grid,
    part: Part,
    limit: np.ndarray,
    phase: float,
    jitter: float,
) -> None:
    """Paint one structure in place, at a contrast phase from 0 (arterial) to 1 (portal venous)."""
    box = grid.box(part.shapes)
    distance = grid.distance(part.shapes)[box]
    distance = np.maximum(distance, -grid.distance(part.minus)[box])
    if part.under_diaphragm:
        distance = np.maximum(distance, limit[box])
    _blend(volume[box], np.interp(phase, (0, 1), part.hu) + jitter, distance, grid.voxel)
    if part.content:
        content = np.interp(phase, (0, 1), part.content)
        content = np.where(grid.points[1][box] > part.gas_above, -900, content)
        _blend(volume[box], content, distance + part.wall, grid.voxel)
    if part.label:
        labels[box][distance < 0] = part.label


def ct_liver(rng: np.random.Generator) -> Case:
    """Draw the abdomen with liver (1) and tumours in it (2)."""
    image, labels, spacing = ct_abdomen(rng, tumours=True)
    return image, ((labels == LIVER) + 2 * (labels == TUMOUR)).astype(np.uint8), spacing


def ct_spleen(rng: np.random.Generator) -> Case:
    """Draw the abdomen with the spleen alone (1)."""
    image, labels, spacing = ct_abdomen(rng)
    return image, (labels == 1).astype(np.uint8), spacing


def ct_organs(rng: np.random.Generator) -> Case:
    """Draw the abdomen in coarse voxels, with its largest organs alone."""
    image, labels, spacing = ct_abdomen(rng, coarser=COARSE)
    return image, sum((labels == old) * np.uint8(new) for new, old in enumerate(ORGANS, start=1)), spacing


def brain_mri(rng: np.random.Generator) -> Case:
    """Draw MRI [X, Y, Z, 4] in scanner units (int16) of a brain, skull-stripped, with a tumour."""
    spacing = np.round(rng.uniform(1.2, 1.5, 3), 2)
    size = tuple(np.clip(np.array((162, 196, 166)) / spacing, 120, 160).astype(int).tolist())
    grid = Grid(rng, size, spacing, np.array([0, -6, -4]), 1.4)

    centre = rng.uniform((28, -40, 12), (40, 34, 36)) * (rng.choice([-1, 1]), 1, 1)
    radius, rim, swelling = rng.uniform(12, 19), rng.uniform(3, 4.5), rng.uniform(10, 18)
    offset = grid.points - centre.astype(np.float32).reshape(3, 1, 1, 1)
    away = np.sqrt((offset**2).sum(0))
    # Mass effect: healthy brain is read nearer to the tumour's centre and so looks pushed outwards.
    grid.points -= offset * (0.3 * np.exp(-((away / (1.7 * radius)) ** 2)))
    tissue = _healthy_brain(rng, grid)

    labels = np.zeros(size, np.uint8)
    core = away - radius + 2.5 * _smooth_noise(rng, size, 14)
    edema = core < swelling + 5 * _smooth_noise(rng, size, 9)
    for where, kind, label in (
        (edema & (tissue == WHITE), EDEMA, 2),  # swelling spreads along white matter and spares the cortex
        ((tissue != BACKGROUND) & (core < 0), ENHANCING, 4),
        ((tissue != BACKGROUND) & (core < 1.3 * _smooth_noise(rng, size, 22) - rim), NECROSIS, 1),
    ):
        tissue[where], labels[where] = kind, label

    brain = tissue != BACKGROUND
    image = np.zeros((*size, len(CHANNELS)), np.int16)
    for channel, scale in enumerate(10 ** rng.uniform(2.3, 3.2, len(CHANNELS))):
        signal = gaussian_filter(SIGNAL[tissue, channel], 0.55)[brain]
        signal *= np.exp(0.1 * _smooth_noise(rng, size, 4)[brain])  # bias field of the coil
        signal += 0.025 * rng.standard_normal(signal.shape, np.float32)
        image[brain, channel] = np.maximum(np.round(scale * signal), 1)
    return image, labels, spacing


def _healthy_brain(rng: np.random.Generator, grid: Grid) -> np.ndarray:
    """Return the tissue [X, Y, Z] (uint8) at every point of the grid."""
    _, y, z = grid.points
    cerebrum = np.maximum(grid.distance((CEREBRUM,)), -22 - z)
    cerebrum = np.minimum(cerebrum, grid.distance(TEMPORAL_LOBES))
    cerebellum, stem = grid.distance(CEREBELLUM), grid.distance(BRAINSTEM)
    surface = np.minimum(np.minimum(cerebrum, cerebellum), stem)
    tissue = np.where(surface < 1.2, WHITE, BACKGROUND).astype(np.uint8)

    upper, lower = cerebrum < 1.2, (cerebrum > 0) & (surface < 1.2)
    pia = np.full(cerebrum.shape, np.inf, np.float32)  # mm from the surface, that of the sulci included
    wander = np.stack([_smooth_noise(rng, cerebrum.shape, 14)[upper] for _ in range(3)])
    pia[upper] = np.minimum(-cerebrum[upper], _fissures(rng, grid.points[:, upper], -cerebrum[upper], wander))
    folia = np.abs((np.hypot(z + 40, y + 40) / 5.5) % 1 - 0.5) * 5.5
    for where, kind in (
        (pia < 3.6, GREY),
        (lower & (cerebellum > -12), GREY),
        (lower & (cerebellum > -10) & (folia < 0.5), CSF),
        (lower & (stem < 0), WHITE),
        (grid.distance(DEEP_NUCLEI) < 0, DEEP_GREY),
        ((pia < 0.8) | ((surface > 0) & (surface < 1.2)), CSF),
        (grid.distance(VENTRICLES) < rng.uniform(-0.8, 2.0), CSF),
    ):
        tissue[where] = kind
    return tissue


def _fissures(rng: np.random.Generator, points: np.ndarray, depth: np.ndarray, wander: np.ndarray) -> np.ndarray:
    """Return the distance [N] in mm to the nearest fissure, at points [3, N] that lie depth [N] mm deep.

    Sulci are the zero crossings of smooth noise on the surface of a lobe, carried inwards because real ones
    stand upright on the surface too, and wandering a little (wander [3, N], unit variance).
    """
    x, y, z = points
    noise = gaussian_filter(rng.standard_normal((128,) * 3, np.float32), 2)
    deep = gaussian_filter(rng.standard_normal((64,) * 3, np.float32), 3)
    pitch = 1.5  # mm of brain surface for one voxel of noise
    surface = np.empty_like(points)
    lobes = (CEREBRUM, *TEMPORAL_LOBES)
    owner = np.argmin([lobe.distance(points) for lobe in lobes], 0)
    for number, lobe in enumerate(lobes):
        own = owner == number
        offset = points[:, own] - np.reshape(lobe.centre, (3, 1))
        level = np.sqrt(((offset / np.reshape(lobe.radii, (3, 1))) ** 2).sum(0)) + 0.05
        surface[:, own] = 63.5 + offset / level / pitch
    surface = np.clip(surface + 1.6 * wander, 0, 127)
    # Noise of unit variance blurred by sigma crosses zero with a slope of about 1 / (sigma * sqrt(2)).
    fold = np.abs(map_coordinates(noise, surface, order=1)) / noise.std() * 2 * pitch * 2**0.5
    floor = 20 + 5 * map_coordinates(deep, surface / 2, order=1) / deep.std()
    sulci = np.hypot(fold, np.maximum(depth - floor, 0))
    midbrain = (x / 25) ** 2 + ((y + 8) / 36) ** 2 + ((z + 12) / 22) ** 2 < 1
    callosum = 20 * (np.hypot((y + 6) / 40, (z - 8) / 20) - 1)  # the hemispheres join inside this ellipse
    midline = np.hypot(x + 3 * wander[0], np.maximum(-callosum, 0)) - 0.3
    insula = np.maximum(36 - np.abs(x), 0) + np.maximum(np.abs(y) - 32, 0)
    sylvian = np.hypot(0.9 * z + 3 + 0.45 * y, insula) - 0.3
    return np.minimum(np.minimum(np.where(midbrain, np.inf, sulci), midline), sylvian)


def hippocampus_mri(rng: np.random.Generator) -> Case:
    """Draw a crop of T1-weighted MRI [X, Y, Z] at 1 mm in scanner units (int16) around one hippocampus."""
    size = tuple(np.round(rng.triangular((31, 40, 24), HIPPOCAMPUS_FIELD, (43, 59, 47))).astype(int).tolist())
    grid = Grid(rng, size, np.divide(HIPPOCAMPUS_FIELD, size), np.array([0, 1, -2]), 1.0)
    hippocampus = grid.distance(HIPPOCAMPUS)
    volume = np.ones(size, np.float32)
    # Convolutions of the cortex around it: sheets of grey matter, with CSF in the middle of the wide ones.
    fold = 8 * np.abs(_smooth_noise(rng, size, 6))
    for signal, distance in ((0.6, fold - 3.5), (0.15, fold - 1)):
        _blend(volume, signal, np.maximum(distance, 1.5 - hippocampus), grid.voxel)
    for signal, shapes in TEMPORAL_LOBE:
        _blend(volume, signal + rng.normal(0, 0.03), grid.distance(shapes), grid.voxel)
    labels = np.where(hippocampus < 0, np.where(grid.points[1] > HEAD_ENDS, 1, 2), 0).astype(np.uint8)
    volume = gaussian_filter(volume, 0.4) * np.exp(0.1 * _smooth_noise(rng, size, 4))  # bias field of the coil
    volume += rng.uniform(0.03, 0.08) * rng.standard_normal(size, np.float32)
    return np.maximum(np.round(10 ** rng.uniform(1.9, 3.3) * volume), 0).astype(np.int16), labels, np.ones(3)
