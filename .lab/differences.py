"""Features with their first differences beside them: [T, D] -> [T, 2 D].

    $ python .lab/differences.py /data/mine /data/mine_2d       # a --data_dir, or a folder of files
    $ python teacher.py --data_dir /data/mine_2d ...

The second half of the columns is each feature's change since the frame before, 0 in the first one.
This pays on landmarks as landmarks.py makes them, held where a part is not found; not where missing
ones are zeros (.lab/RESULTS.md, section 2). Features that have velocities already need none.
Files for --predict go the same way. Annotation files are copied, anything else is left out.
"""

import shutil
import sys
from pathlib import Path

import lab
import numpy as np

sys.path.insert(0, str(lab.ROOT))
from teacher import read_features  # noqa: E402


def main():
    if len(sys.argv) != 3:
        sys.exit("usage: differences.py SOURCE TARGET")
    source, target = map(Path, sys.argv[1:])
    found = [path for path in sorted(source.rglob("*")) if path.suffix in (".npy", ".npz", ".csv")]
    if not found:
        sys.exit(f"{source}: no .npy, .npz or .csv in it")
    for path in found:
        new = target / path.relative_to(source)
        new.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".csv":
            shutil.copy(path, new)
            continue
        try:
            features = read_features(path)
        except ValueError as error:
            sys.exit(f"differences.py: {error}")
        change = np.diff(features, axis=0, prepend=features[:1])
        np.save(new.with_suffix(".npy"), np.concatenate((features, change), axis=1))
    print(f"{target}: {len(found)} files")


if __name__ == "__main__":
    main()
