from pathlib import Path
from tiny_onn.deploy.exporting import Job
def write(job: Job, folder: Path) -> str:
    return ""
