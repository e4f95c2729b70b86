"""DICOM segmentations of DICOM series, with highdicom (an optional package)."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pydicom
from ignite.engine import Engine, Events

from tools.common.files import atomic_path
from tools.data.classes import Classes, own_values
from tools.data.dicom import slice_files
from tools.data.kinds import UnfitError
from tools.data.outputs import output_name
from tools.data.scans import ScanError

Term = Sequence[Any]  # SNOMED CT code and meaning


class SaveDicomSeg:
    """Writes the label map of each DICOM series as `NAME/NAME_seg.dcm`: a handler of the evaluator of inference.

    The segments have the names of the classes. Patient, study, frame of reference and the references to each slice are
    those of the series.

    Args:
        classes: class name → label values.
        coded_terms: class name → `category`, `type` and, if it has a side, `modifier`.
        output_dir: folder of all results.
        bundle_root: folder of the bundle, whose name and version are written as those of the algorithm.

    Raises:
        ValueError: highdicom is not installed, or a class has no coded term.
    """

    def __init__(
        self,
        classes: Classes,
        coded_terms: Mapping[str, Mapping[str, Term]],
        output_dir: str | Path,
        bundle_root: str | Path,
    ) -> None:
        try:
            import highdicom  # noqa: F401
        except ImportError as error:
            raise ValueError('dicom_seg.yaml needs highdicom: pip install "hybridmim-bundles[dicom]"') from error
        if missing := classes.keys() - coded_terms.keys():
            raise ValueError(f"coded_terms: found none for {', '.join(sorted(missing))}, expected one for each class")
        self.values = own_values(classes)
        self.terms = coded_terms
        self.output_dir = Path(output_dir)
        self.meta = json.loads(Path(bundle_root, "configs/metadata.json").read_text(encoding="utf-8"))

    def attach(self, engine: Engine) -> None:
        """Attach to the evaluator."""
        engine.add_event_handler(Events.ITERATION_COMPLETED, self)

    def __call__(self, engine: Engine) -> None:
        """Write the results of a batch."""
        for item in engine.state.output:
            path = Path(item["pred"].meta["filename_or_obj"])
            try:
                files = slice_files(path)
            except (UnfitError, ScanError) as error:
                print(f"\nno DICOM segmentation of {path}: it {error}", flush=True)
                continue
            name = self.output_dir / output_name(item, path)
            self._write(name / f"{name.name}_seg.dcm", files, np.asarray(item["pred"])[0])

    def _write(self, path: Path, files: Sequence[Path], labels: np.ndarray) -> None:
        """Write a label map [columns, rows, slices] on the slices of these files."""
        import highdicom as hd
        from highdicom.seg import SegmentAlgorithmTypeValues, SegmentationTypeValues

        algorithm = hd.AlgorithmIdentificationSequence(
            name=self.meta["name"][:64],
            version=self.meta["version"],
            family=hd.sr.CodedConcept("123109", "DCM", "Artificial Intelligence"),
        )
        segments = np.zeros(labels.shape, np.uint8)
        descriptions = []
        for number, (name, value) in enumerate(self.values.items(), start=1):
            segments[labels == value] = number
            terms = {
                key: hd.sr.CodedConcept(str(code), "SCT", meaning) for key, (code, meaning) in self.terms[name].items()
            }
            description = hd.seg.SegmentDescription(
                segment_number=number,
                segment_label=name.replace("_", " "),
                segmented_property_category=terms["category"],
                segmented_property_type=terms["type"],
                algorithm_type=SegmentAlgorithmTypeValues.AUTOMATIC,
                algorithm_identification=algorithm,
            )
            if "modifier" in terms:
                kind = description.SegmentedPropertyTypeCodeSequence[0]
                kind.SegmentedPropertyTypeModifierCodeSequence = pydicom.Sequence([terms["modifier"]])
            descriptions.append(description)
        segmentation = hd.seg.Segmentation(
            source_images=[pydicom.dcmread(file) for file in files],
            pixel_array=segments.transpose(2, 1, 0),
            segmentation_type=SegmentationTypeValues.BINARY,
            segment_descriptions=descriptions,
            series_instance_uid=hd.UID(),
            series_number=300,
            sop_instance_uid=hd.UID(),
            instance_number=1,
            manufacturer="HybridMIM Bundles",
            manufacturer_model_name=self.meta["name"][:64],
            software_versions=self.meta["version"],
            device_serial_number="0",
            series_description=f"{self.meta['name']} (research only)"[:64],
        )
        with atomic_path(path) as temporary:
            segmentation.save_as(temporary)
