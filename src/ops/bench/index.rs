//! How fast the page index learns and answers.

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::{BlockKind, Hash, put_raw_block};

use super::{Figure, time_of};
use crate::error::Result;
use crate::platform::clock::Stopwatch;
use crate::platform::files::RealFiles;
use crate::platform::random::Seeded;
use crate::platform::store::LocalStore;
use crate::repo::{Index, PackWriter, Repository};

const PACKS: u64 = 16;
const PAGES_A_PACK: u64 = 8192;
const PAGES: u64 = PACKS * PAGES_A_PACK;

/// As many as a leaf of the tree asks for at once.
const ASKED_AT_ONCE: usize = 512;

fn hash(number: u64) -> Hash {
    let mut random = Seeded::of(5, number);
    let mut hash = [0; 32];
    hash.chunks_exact_mut(8).for_each(|word| word.copy_from_slice(&random.next().to_le_bytes()));
    hash
}

pub(super) fn measure(directory: &Path) -> Result<Vec<Figure>> {
    let store = LocalStore::create(&directory.join("repository"), Arc::new(RealFiles))?;
    let repository = Repository::create(Arc::new(store))?;
    let objects = repository.objects();
    let index_directory = directory.join("index");
    let learn = learn(&repository, &index_directory)?;
    let (index, _) = Index::open(&index_directory, objects, &mut |_, _| {});
    let hashes = |from: u64| -> Vec<Hash> { (from..from + ASKED_AT_ONCE as u64).map(hash).collect() };
    let mut random = Seeded::new(6);
    let mut found = 0;
    let known: Vec<Vec<Hash>> =
        (0..64).map(|_| hashes(random.below(PAGES / ASKED_AT_ONCE as u64) * ASKED_AT_ONCE as u64)).collect();
    let unknown: Vec<Vec<Hash>> = (0..64).map(|group| hashes(PAGES + group * ASKED_AT_ONCE as u64)).collect();
    let hit = time_of(|| {
        for group in &known {
            found += index.find(group, objects).iter().flatten().count();
        }
    });
    let miss = time_of(|| {
        for group in &unknown {
            found += index.find(group, objects).iter().flatten().count();
        }
    });
    assert!(found > 0, "the index finds what it has learnt");
    let rate = |time: Duration| (64 * ASKED_AT_ONCE) as f64 / time.as_secs_f64() / 1000.0;
    Ok(vec![
        Figure::new(
            "index-learn",
            PAGES as f64 / learn.as_secs_f64() / 1000.0,
            "thousand/s",
            format!("pages of {PACKS} packs with {PAGES_A_PACK} each, until the index is closed"),
        ),
        Figure::new("index-hit", rate(hit), "thousand/s", "look-ups of known pages, confirmed by the packs' footers"),
        Figure::new("index-miss", rate(miss), "thousand/s", "look-ups of pages that no pack holds"),
    ])
}

/// Writes packs of tiny blocks under made-up hashes, and returns how long the index takes to learn them.
fn learn(repository: &Repository, directory: &Path) -> Result<Duration> {
    let mut learnt = Vec::new();
    let on_pack = Box::new(|object: &epochfs_format::ObjectRef, footer: &epochfs_format::FooterBuilder| {
        learnt.push((object.clone(), footer.clone()));
        Ok(())
    });
    let mut block = Vec::new();
    put_raw_block(BlockKind::Page, b"no page", &mut block);
    let mut packs = PackWriter::new(repository.objects().clone(), on_pack);
    for number in 0..PAGES {
        packs.push_page(hash(number), &block)?;
    }
    packs.finish(false)?;
    let (index, _) = Index::open(directory, repository.objects(), &mut |_, _| {});
    let started = Stopwatch::start();
    for (object, footer) in &learnt {
        index.learn(object, footer);
    }
    drop(index);
    Ok(started.elapsed())
}
