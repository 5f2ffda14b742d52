//! A small repository that holds one of everything, and how it is judged when some of its bytes are wrong.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicUsize, Ordering};

use epochfs::epoch::{EpochStore, Ranges, Verified};
use epochfs::{Error, Kind};
use epochfs_format::{Attributes, Body, EntryKind, ManifestEntry, ManifestPlace, Owner, is_never_sealed};

use crate::must;
use crate::support::image::{Image, ImageSource, PAGE};
use crate::support::memory::{MemoryStore, ObjectMap};
use crate::support::{Check, Saying, Streams, commit, commit_dirty, create, memory, numbered, open, options};

/// What was read of an epoch: its streams, or the error.
pub type Reading = epochfs::Result<BTreeMap<Vec<u8>, Vec<u8>>>;

/// The objects, and what each epoch holds.
pub struct Sample {
    pub objects: ObjectMap,
    pub epochs: BTreeMap<(String, u64), Streams>,
}

/// Objects of every kind: whole nodes and patches, records that carry blocks and records that do not, a pack, a
/// manifest in a record and one that is an image, a page that does not compress and pages that do.
pub fn sample() -> Sample {
    let store = MemoryStore::default();
    let objects = store.clone();
    let store = create(store);
    let mut epochs = BTreeMap::new();
    let mut image = crate::crash::noisy_image(1, 1);
    image.resize(9 * PAGE + 7);
    image.write(3 * PAGE, b"three");
    image.write(8 * PAGE, &[7; 500]);
    let mut streams = memory(&image);
    streams.insert(b"dir/disk0".to_vec(), Image::of(b"short"));
    streams.insert(b"empty".to_vec(), Image::zeros(0));
    commit(&store, "web1", &streams, options()).unwrap();
    epochs.insert(("web1".into(), 1), streams.clone());

    image.write(3 * PAGE, b"THREE");
    let dirty = Ranges::new(vec![3 * PAGE..4 * PAGE]);
    commit_dirty(&store, "web1", &ImageSource::new(image.clone()), &dirty).unwrap();
    epochs.insert(("web1".into(), 2), memory(&image));

    // Directories with long names make the manifest too long for a record.
    let mut large = store.begin_commit("web1", options()).unwrap();
    for (path, image) in &streams {
        large.add_stream(path, Attributes::default(), &ImageSource::new(image.clone()), None).unwrap();
    }
    for number in 0..5 {
        let path = [vec![b'a' + number; 255].as_slice(); 15].join(&b'/');
        large.add_entry(ManifestEntry { path, attributes: Attributes::default(), kind: EntryKind::Directory }).unwrap();
    }
    large.finish().unwrap();
    epochs.insert(("web1".into(), 3), streams.clone());

    store.tag(&"web1".into(), 3, "golden", false).unwrap();
    for (from, to) in [(2, "web2"), (3, "web3")] {
        let source = store.epoch(&numbered("web1", from)).unwrap();
        store.clone_epoch(source.record(), to).unwrap();
        epochs.insert((to.into(), 1), epochs[&("web1".to_owned(), from)].clone());
    }
    store.drop_epochs(&"web1".into(), &[1].into()).unwrap();
    epochs.remove(&("web1".into(), 1));
    let owner = Owner { host: [3; 16], name: "host3".into(), lease_ms: 5000 };
    let ownership = store.own(&"web2".into(), owner, false).unwrap();
    store.release(&ownership).unwrap();
    store.create_machine("gone").unwrap();
    store.remove_machine(&"gone".into(), false).unwrap();
    let mut second = memory(&image);
    second.get_mut(b"memory".as_slice()).unwrap().put_page(0, [0; PAGE as usize]);
    commit(&store, "web2", &second, options()).unwrap();
    epochs.insert(("web2".into(), 4), second);
    let objects = objects.objects();
    let sample = Sample { objects, epochs };
    sample.check_kinds(&store);
    sample
}

impl Sample {
    /// That the sample has everything that it says.
    fn check_kinds(&self, store: &EpochStore) {
        let commit = |machine: &str, epoch| match store.epoch(&numbered(machine, epoch)).unwrap().record().body.clone()
        {
            Body::Commit(commit) => commit,
            other => panic!("{other:?}"),
        };
        assert!(matches!(commit("web1", 2).manifest, ManifestPlace::Inline(_)));
        assert!(matches!(commit("web1", 3).manifest, ManifestPlace::Image(_)));
        assert!(commit("web1", 2).packs.is_empty() && !commit("web1", 3).packs.is_empty());
        assert!(self.objects.keys().any(|key| key.starts_with("packs/")));
    }

    pub fn bytes(&self) -> usize {
        self.objects.values().map(|bytes| bytes.len()).sum()
    }

    /// What a new process makes of these objects: every epoch, and what `verify` says. An error when the repository
    /// cannot be opened at all.
    pub fn look(&self, objects: ObjectMap) -> epochfs::Result<Looked> {
        let store = MemoryStore::of(objects);
        let readings = {
            let store = open(store.clone())?;
            self.epochs
                .keys()
                .map(|(machine, epoch)| (machine.clone(), *epoch))
                .map(|name| {
                    let reading = read_epoch(&store, &name.0, name.1);
                    (name, reading)
                })
                .collect()
        };
        Ok(Looked { readings, verified: open(store)?.verify(&mut |_, _| {}) })
    }

    /// Whether these findings do justice to damage in the object with this key.
    pub fn judge(&self, looked: &epochfs::Result<Looked>, key: &str) -> Check {
        let looked = match looked {
            Ok(looked) => looked,
            Err(error) if is_never_sealed(key) && is_told(error) => return Ok(()),
            Err(error) => return Err(format!("the repository cannot be opened: {error}")),
        };
        self.judge_readings(looked)?;
        let verified = looked.verified.as_ref().saying("verify")?;
        let block = format!("{key} at offset ");
        let named = verified.problems.iter().any(|problem| problem.object == key || problem.object.starts_with(&block));
        must!(named, "verify does not name {key}: {:?} {:?}", verified.problems, verified.broken_epochs);
        Ok(())
    }

    /// Right bytes or an error, for each epoch.
    pub fn judge_readings(&self, looked: &Looked) -> Check {
        for ((machine, epoch), reading) in &looked.readings {
            match reading {
                Ok(streams) => {
                    let expected = &self.epochs[&(machine.clone(), *epoch)];
                    must!(streams.keys().eq(expected.keys()), "{machine}@{epoch} has other streams");
                    for (path, bytes) in streams {
                        let right = *bytes == expected[path].bytes();
                        must!(right, "WRONG BYTES are served of {machine}@{epoch}, {}", path.escape_ascii());
                    }
                }
                Err(error) => must!(is_told(error), "{machine}@{epoch}: {:?}: {error}", error.kind()),
            }
        }
        Ok(())
    }
}

/// Damage is told as damage, or as a format that is not known.
fn is_told(error: &Error) -> bool {
    matches!(error.kind(), Kind::Damaged | Kind::Unsupported)
}

pub struct Looked {
    pub readings: BTreeMap<(String, u64), Reading>,
    pub verified: epochfs::Result<Verified>,
}

fn read_epoch(store: &EpochStore, machine: &str, epoch: u64) -> Reading {
    let epoch = store.epoch(&numbered(machine, epoch))?;
    let mut streams = BTreeMap::new();
    for (path, image) in epoch.manifest().streams() {
        let mut reader = epoch.stream(path)?;
        let mut bytes = vec![0xaa; image.length as usize];
        reader.read_at(0, &mut bytes)?;
        streams.insert(path.to_vec(), bytes);
    }
    Ok(streams)
}

/// Does the work for every item on two threads.
pub fn for_each<T: Sync>(items: &[T], work: impl Fn(&T) + Sync) {
    let next = AtomicUsize::new(0);
    std::thread::scope(|scope| {
        for _ in 0..2 {
            scope.spawn(|| {
                while let Some(item) = items.get(next.fetch_add(1, Ordering::Relaxed)) {
                    work(item);
                }
            });
        }
    });
}
