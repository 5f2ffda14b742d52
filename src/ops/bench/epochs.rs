//! Committing and exporting an image, end to end.

use std::collections::BTreeSet;
use std::fs::{File, OpenOptions};
use std::io::{BufWriter, Write};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use epochfs_format::{PAGE_SIZE, is_zero};

use super::{Figure, megabytes_a_second, pages, scratch_error};
use crate::epoch::{CommitOptions, Committed, EpochName, EpochStore, FileSource, Ranges, Source, export};
use crate::error::Result;
use crate::platform::clock::Stopwatch;
use crate::platform::files::RealFiles;
use crate::platform::random::Seeded;
use crate::platform::store::LocalStore;
use crate::repo::Repository;

const MACHINE: &str = "bench";
const STREAM: &[u8] = b"memory";
const DIRTY_PAGES: u64 = 1000;
const SEED: u64 = 7;

struct Bench {
    store: EpochStore,
    image: PathBuf,
    image_bytes: u64,
    figures: Vec<Figure>,
}

pub(super) fn measure(directory: &Path, image_bytes: u64) -> Result<Vec<Figure>> {
    let image = directory.join("image");
    write_image(&image, image_bytes)?;
    let store = LocalStore::create(&directory.join("repository"), Arc::new(RealFiles))?;
    let store = EpochStore::new(Repository::create(Arc::new(store))?).with_state(directory.join("state"));
    // Opening the index is not part of a commit where a process commits more than once.
    store.index(None);
    let mut bench = Bench { store, image, image_bytes, figures: Vec::new() };
    bench.commit("commit-first", None, "every page is read, and most of what is not zeros is new")?;
    bench.commit("commit-unchanged", None, "every page is read and none differs")?;
    let dirty = bench.dirty_pages(SEED + 1)?;
    bench.commit(
        "commit-dirty",
        Some(&dirty),
        &format!("{} scattered pages, and which is known", page_count(&dirty)),
    )?;
    let dirty = bench.dirty_pages(SEED + 2)?;
    bench.commit(
        "commit-scan",
        None,
        &format!("{} scattered pages, found by reading everything", page_count(&dirty)),
    )?;
    bench.export(&directory.join("export"))?;
    Ok(bench.figures)
}

fn page_count(ranges: &Ranges) -> u64 {
    ranges.total() / PAGE_SIZE as u64
}

/// Writes a sparse image, and has it written back so that this does not slow down what is measured.
fn write_image(path: &Path, len: u64) -> Result<()> {
    let failed = |error| scratch_error(path, error);
    let write = || -> std::io::Result<()> {
        use std::io::{Seek, SeekFrom};
        let mut file = BufWriter::with_capacity(1 << 20, File::create_new(path)?);
        for number in 0..len / PAGE_SIZE as u64 {
            let page = pages::image_page(SEED, number);
            if is_zero(&page) {
                file.seek(SeekFrom::Start((number + 1) * PAGE_SIZE as u64))?;
            } else {
                file.write_all(&page)?;
            }
        }
        let file = file.into_inner()?;
        file.set_len(len)?;
        file.sync_all()
    };
    write().map_err(failed)
}

impl Bench {
    fn commit(&mut self, name: &str, dirty: Option<&Ranges>, detail: &str) -> Result<Committed> {
        let started = Stopwatch::start();
        let source = FileSource::open(&self.image)?;
        let mut commit = self.store.begin_commit(MACHINE, CommitOptions::default())?;
        commit.add_stream(STREAM, source.attributes(), &source, dirty)?;
        let committed = commit.finish()?;
        let elapsed = started.elapsed();
        let detail = format!(
            "{detail}; {} MiB, {} changed pages, {} KiB stored",
            source.len() >> 20,
            committed.counts.changed_pages,
            committed.stored_bytes >> 10
        );
        self.figures.push(Figure::new(name, elapsed.as_secs_f64() * 1000.0, "ms", detail));
        if dirty.is_none() {
            let rate = megabytes_a_second(self.image_bytes, elapsed);
            self.figures.push(Figure::new(format!("{name}-rate"), rate, "MB/s", "of the image's length"));
        }
        Ok(committed)
    }

    /// Rewrites scattered pages, or every fourth of a small image's, and says which.
    fn dirty_pages(&self, seed: u64) -> Result<Ranges> {
        let failed = |error| scratch_error(&self.image, error);
        let all = self.image_bytes / PAGE_SIZE as u64;
        let mut random = Seeded::new(seed);
        let mut dirty = BTreeSet::new();
        while (dirty.len() as u64) < DIRTY_PAGES.min(all / 4) {
            dirty.insert(random.below(all));
        }
        let file = OpenOptions::new().write(true).open(&self.image).map_err(failed)?;
        for number in &dirty {
            let page = pages::filled_page(seed, *number);
            file.write_all_at(&page, number * PAGE_SIZE as u64).map_err(failed)?;
        }
        file.sync_all().map_err(failed)?;
        let size = PAGE_SIZE as u64;
        Ok(Ranges::new(dirty.iter().map(|number| number * size..(number + 1) * size).collect()))
    }

    fn export(&mut self, directory: &Path) -> Result<()> {
        let name = EpochName { machine: MACHINE.into(), which: None };
        let started = Stopwatch::start();
        let epoch = self.store.epoch(&name)?;
        let exported = export(&epoch, &[], directory, &|_| {})?;
        let elapsed = started.elapsed();
        let detail = format!("{} MiB written, every page proven, not synced", exported.written_bytes >> 20);
        self.figures.push(Figure::new("export", elapsed.as_secs_f64() * 1000.0, "ms", detail));
        let rate = megabytes_a_second(exported.written_bytes, elapsed);
        self.figures.push(Figure::new("export-rate", rate, "MB/s", "of bytes that are not holes"));
        Ok(())
    }
}
