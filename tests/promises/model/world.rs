//! A real repository beside its oracle: operations on both, and what must then be equal.

use std::collections::{BTreeMap, BTreeSet, HashMap};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, MetadataExt};
use std::path::PathBuf;
use std::sync::Arc;

use epochfs::Kind;
use epochfs::epoch::{
    BytesSource, CommitBuilder, CommitOptions, Committed, Epoch, EpochName, EpochStore, FileSource, PagesSource,
    Ranges, Which,
};
use epochfs::platform::files::RealFiles;
use epochfs::platform::random::Seeded;
use epochfs::platform::store::{LocalStore, RemoteStore, Store};
use epochfs::repo::Repository;
use epochfs_format::{Attributes, Hash};

use super::oracle::{MACHINES, Machine, TAGS, mutate, pick, some_length, stream_names};
use crate::must;
use crate::support::image::{Image, ImageSource, LEAF, PAGE};
use crate::support::memory::MemoryStore;
use crate::support::{Check, Saying, Streams, compare, compare_bytes, compare_listing, latest, numbered};

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Op {
    Commit,
    CommitMany,
    Clone,
    Tag,
    Untag,
    Drop,
    Remove,
    Create,
    Reopen,
    HarmIndex,
}

/// An operation and the seed of all its choices.
pub type Step = (Op, u64);

/// Where the repository is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kept {
    Memory,
    /// In an object store, as in a bucket.
    Bucket,
    Directory,
    DirectoryWithIndex,
}

/// What a canary does wrong.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Fault {
    None,
    PageNotTold,
    RecordLost,
}

pub struct World {
    directory: tempfile::TempDir,
    kept: Kept,
    store: Arc<dyn Store>,
    /// Two, as of two processes.
    stores: [EpochStore; 2],
    machines: BTreeMap<String, Machine>,
    /// The digest of each content, and the content of each digest.
    digests: HashMap<[u8; 32], Hash>,
    contents: HashMap<Hash, [u8; 32]>,
    files: u64,
}

fn state(directory: &tempfile::TempDir) -> PathBuf {
    directory.path().join("state")
}

fn open(kept: Kept, directory: &tempfile::TempDir, store: &Arc<dyn Store>) -> Check<EpochStore> {
    // Not the same object: nothing may be handed over but what is stored.
    let store: Arc<dyn Store> = match kept {
        Kept::Memory | Kept::Bucket => store.clone(),
        _ => Arc::new(LocalStore::open(&directory.path().join("repository"), Arc::new(RealFiles)).saying("open")?),
    };
    let opened = EpochStore::new(Repository::open(store).saying("open")?);
    Ok(if kept == Kept::DirectoryWithIndex { opened.with_state(state(directory)) } else { opened })
}

impl World {
    pub fn new(kept: Kept) -> Check<Self> {
        let directory = tempfile::tempdir().saying("a temporary directory")?;
        let store: Arc<dyn Store> = match kept {
            Kept::Memory => Arc::new(MemoryStore::default()),
            Kept::Bucket => {
                let bucket = Arc::new(object_store::memory::InMemory::new());
                Arc::new(RemoteStore::new(bucket, "memory://bucket").saying("a store in a bucket")?)
            }
            _ => Arc::new(
                LocalStore::create(&directory.path().join("repository"), Arc::new(RealFiles)).saying("create")?,
            ),
        };
        Repository::create(store.clone()).saying("create")?;
        let stores = [open(kept, &directory, &store)?, open(kept, &directory, &store)?];
        let machines = MACHINES.iter().map(|name| ((*name).to_owned(), Machine::default())).collect();
        Ok(Self {
            directory,
            kept,
            store,
            stores,
            machines,
            digests: HashMap::new(),
            contents: HashMap::new(),
            files: 0,
        })
    }

    fn reopen(&mut self, which: usize) -> Check {
        self.stores[which] = open(self.kept, &self.directory, &self.store)?;
        Ok(())
    }

    /// Does an operation on the repository and on the oracle.
    pub fn apply(&mut self, (op, seed): Step) -> Check {
        let seeded = &mut Seeded::new(seed);
        let which = seeded.below(2) as usize;
        let few = 1 + seeded.below(MACHINES.len() as u64) as usize;
        let name = pick(seeded, &MACHINES[..few]).unwrap().to_string();
        match op {
            Op::Commit => self.commit(which, &name, seeded)?,
            Op::CommitMany => self.commit_many(which, &name, seeded)?,
            Op::Clone => self.clone_epoch(which, &name, seeded)?,
            Op::Tag => self.tag(which, &name, seeded)?,
            Op::Untag => self.untag(which, &name, seeded)?,
            Op::Drop => self.drop_epochs(which, &name, seeded)?,
            Op::Remove => self.remove(which, &name)?,
            Op::Create => self.create(which, &name)?,
            Op::Reopen => self.reopen(which)?,
            Op::HarmIndex => self.harm_index(seeded)?,
        }
        self.check_lists(seeded.below(2) as usize)?;
        self.check_some(seeded.below(2) as usize, seeded)
    }

    /// Commits two pages of a new machine as dirty, and does something wrong with the second.
    pub fn plant(&mut self, fault: Fault) -> Check {
        let mut image = Image::zeros(10 * PAGE);
        let streams = |image: &Image| Streams::from([(b"memory".to_vec(), image.clone())]);
        let store = &self.stores[0];
        crate::support::commit(store, "canary", &streams(&image), CommitOptions::default()).saying("commit")?;
        image.write(3 * PAGE, b"three");
        image.write(7 * PAGE, b"seven");
        let told = if fault == Fault::PageNotTold { 3 } else { 7 };
        let dirty = Ranges::new(vec![3 * PAGE..4 * PAGE, told * PAGE..(told + 1) * PAGE]);
        let source = ImageSource::only(image.clone(), &dirty, image.length);
        crate::support::commit_dirty(store, "canary", &source, &dirty).saying("commit")?;
        if fault == Fault::RecordLost {
            self.store.delete(&epochfs_format::record_key("canary", 2)).saying("delete")?;
        }
        let mut machine = Machine { exists: true, newest: 2, ..Machine::default() };
        machine.epochs.insert(1, streams(&Image::zeros(10 * PAGE)));
        machine.epochs.insert(2, streams(&image));
        self.machines.insert("canary".into(), machine);
        Ok(())
    }

    fn commit(&mut self, which: usize, name: &str, seeded: &mut Seeded) -> Check {
        let machine = &self.machines[name];
        let parent = machine.latest();
        let mut streams: Streams = machine.epochs.get(&parent).cloned().unwrap_or_default();
        let before = streams.clone();
        let mut options = CommitOptions { threads: 1 + seeded.below(3) as usize, ..CommitOptions::default() };
        options.compression_level = [1, -1, 3][seeded.below(3) as usize];
        if seeded.chance(150) {
            options.tags = vec![pick(seeded, &TAGS).unwrap().to_string()];
        }
        if seeded.chance(200) {
            options.parent = Some(parent);
        }
        // Unchanged commits happen too.
        let changes = if seeded.chance(100) { 0 } else { 1 + seeded.below(3) };
        for _ in 0..changes {
            let names: Vec<Vec<u8>> = streams.keys().cloned().collect();
            match (seeded.below(6), pick(seeded, &names).cloned()) {
                (0, Some(path)) if names.len() > 1 => drop(streams.remove(&path)),
                (1, _) | (_, None) => {
                    let mut image = Image::zeros(some_length(seeded));
                    mutate(seeded, &mut image);
                    streams.insert(pick(seeded, &stream_names()).unwrap().clone(), image);
                }
                (_, Some(path)) => mutate(seeded, streams.get_mut(&path).expect("it was listed")),
            }
        }
        let mut commit = self.stores[which].begin_commit(name, options.clone()).saying("begin_commit")?;
        must!(commit.parent() == parent, "the parent is {} instead of {parent}", commit.parent());
        for (path, image) in &streams {
            add(&mut commit, path, image, before.get(path), seeded, &self.directory, &mut self.files)
                .saying(format!("{name}, stream {}", path.escape_ascii()))?;
        }
        let committed = commit.finish().saying("commit")?;
        check_counts(&committed, &streams, &before)?;
        self.committed(name, committed.epoch, streams, &options.tags)
    }

    fn commit_many(&mut self, which: usize, name: &str, seeded: &mut Seeded) -> Check {
        let parent = self.machines[name].latest();
        let mut streams: Streams = self.machines[name].epochs.get(&parent).cloned().unwrap_or_default();
        for number in 0..300_u64 {
            if number % 3 == seeded.below(3) {
                let mut image = Image::zeros(1 + seeded.below(3 * PAGE));
                image.write(0, &[1 + (number % 255) as u8]);
                streams.insert(format!("many/{number}").into_bytes(), image);
            }
        }
        let before = self.machines[name].epochs.get(&parent).cloned().unwrap_or_default();
        let mut commit = self.stores[which].begin_commit(name, CommitOptions::default()).saying("begin_commit")?;
        for (path, image) in &streams {
            add(&mut commit, path, image, before.get(path), seeded, &self.directory, &mut self.files)?;
        }
        let committed = commit.finish().saying("commit of many")?;
        check_counts(&committed, &streams, &before)?;
        self.committed(name, committed.epoch, streams, &[])
    }

    fn committed(&mut self, name: &str, epoch: u64, streams: Streams, tags: &[String]) -> Check {
        let machine = self.machines.get_mut(name).expect("all machines are in the oracle");
        machine.newest += 1;
        must!(epoch == machine.newest, "{name}: epoch {epoch} instead of {}", machine.newest);
        machine.exists = true;
        machine.epochs.insert(epoch, streams);
        machine.tags.extend(tags.iter().map(|tag| (tag.clone(), epoch)));
        Ok(())
    }

    fn clone_epoch(&mut self, which: usize, to: &str, seeded: &mut Seeded) -> Check {
        let Some((from, epoch)) = self.some_epoch(seeded) else { return Ok(()) };
        let source = self.stores[which].epoch(&numbered(&from, epoch)).saying("open")?;
        let cloned = self.stores[1 - which].clone_epoch(source.record(), to);
        if self.machines[to].exists {
            return must_be(cloned, Kind::Conflict, "cloning over a machine");
        }
        let streams = self.machines[&from].epochs[&epoch].clone();
        self.committed(to, cloned.saying("clone")?.record.seq, streams, &[])
    }

    fn tag(&mut self, which: usize, name: &str, seeded: &mut Seeded) -> Check {
        let tag = *pick(seeded, &TAGS).unwrap();
        let (moved, machine) = (seeded.chance(500), &self.machines[name]);
        let candidates: Vec<u64> = machine.epochs.keys().chain(&machine.gone).copied().chain([99_999]).collect();
        let epoch = *pick(seeded, &candidates).expect("there is always one");
        let tagged = self.stores[which].tag(&name.into(), epoch, tag, moved);
        let named = machine.tags.get(tag).copied();
        if !machine.exists || !machine.epochs.contains_key(&epoch) {
            // Which of the two is wrong is told first does not matter.
            return match tagged {
                Err(error) if error.kind() == Kind::NotFound => Ok(()),
                Err(error) if error.kind() == Kind::Conflict && named.is_some() => Ok(()),
                other => Err(format!("tagging {name}@{epoch}, which does not exist: {:?}", other.map(|_| ()))),
            };
        }
        if !moved && named.is_some_and(|named| named != epoch) {
            return must_be(tagged, Kind::Conflict, "moving a tag without force");
        }
        let seq = tagged.saying("tag")?.record.seq;
        let machine = self.machines.get_mut(name).expect("all machines are in the oracle");
        if named != Some(epoch) || moved {
            machine.edit();
        }
        must!(seq == machine.newest, "{name}: tag in record {seq} instead of {}", machine.newest);
        machine.tags.insert(tag.to_owned(), epoch);
        Ok(())
    }

    fn untag(&mut self, which: usize, name: &str, seeded: &mut Seeded) -> Check {
        let tag = *pick(seeded, &TAGS).unwrap();
        let untagged = self.stores[which].untag(&name.into(), tag);
        let machine = self.machines.get_mut(name).expect("all machines are in the oracle");
        if !machine.exists || machine.tags.remove(tag).is_none() {
            return must_be(untagged, Kind::NotFound, "deleting a tag that is not there");
        }
        untagged.saying("untag")?;
        machine.edit();
        Ok(())
    }

    fn drop_epochs(&mut self, which: usize, name: &str, seeded: &mut Seeded) -> Check {
        let machine = self.machines.get_mut(name).expect("all machines are in the oracle");
        let live: Vec<u64> = machine.epochs.keys().copied().collect();
        let mut dropped = BTreeSet::new();
        for _ in 0..=seeded.below(3) {
            dropped.extend(pick(seeded, &live).copied());
        }
        if seeded.chance(100) || dropped.is_empty() {
            dropped.insert(machine.gone.first().copied().unwrap_or(77));
            let result = self.stores[which].drop_epochs(&name.into(), &dropped);
            return must_be(result, Kind::NotFound, "dropping what does not exist");
        }
        self.stores[which].drop_epochs(&name.into(), &dropped).saying("drop")?;
        machine.edit();
        dropped.iter().for_each(|epoch| machine.drop_epoch(*epoch));
        Ok(())
    }

    fn remove(&mut self, which: usize, name: &str) -> Check {
        let machine = self.machines.get_mut(name).expect("all machines are in the oracle");
        let removed = self.stores[which].remove_machine(&name.into(), false);
        if !machine.exists {
            return must_be(removed, Kind::NotFound, "removing what does not exist");
        }
        removed.saying("remove")?;
        machine.edit();
        machine.exists = false;
        machine.tags.clear();
        machine.gone.extend(std::mem::take(&mut machine.epochs).into_keys());
        Ok(())
    }

    fn create(&mut self, which: usize, name: &str) -> Check {
        let machine = self.machines.get_mut(name).expect("all machines are in the oracle");
        let created = self.stores[which].create_machine(name);
        if machine.exists {
            return must_be(created, Kind::Conflict, "creating what exists");
        }
        created.saying("create")?;
        machine.edit();
        machine.exists = true;
        Ok(())
    }

    /// Deletes or damages what is derived; nothing may depend on it.
    fn harm_index(&mut self, seeded: &mut Seeded) -> Check {
        if self.kept != Kept::DirectoryWithIndex {
            return Ok(());
        }
        // Close both, and with them the database.
        let other = tempfile::tempdir().saying("a temporary directory")?;
        let memory: Arc<dyn Store> = Arc::new(MemoryStore::default());
        Repository::create(memory.clone()).saying("create")?;
        for store in &mut self.stores {
            *store = open(Kept::Memory, &other, &memory)?;
        }
        harm(&state(&self.directory), seeded).saying("harming the index")?;
        self.reopen(0)?;
        self.reopen(1)
    }

    fn some_epoch(&self, seeded: &mut Seeded) -> Option<(String, u64)> {
        let all: Vec<(String, u64)> = self
            .machines
            .iter()
            .flat_map(|(name, machine)| machine.epochs.keys().map(|epoch| (name.clone(), *epoch)))
            .collect();
        pick(seeded, &all).cloned()
    }

    /// The lists of machines, epochs and tags.
    fn check_lists(&self, which: usize) -> Check {
        let repository = self.stores[which].repository();
        let found: BTreeSet<String> =
            repository.machines().saying("machines")?.iter().map(|name| name.to_string()).collect();
        let expected: BTreeSet<String> =
            self.machines.iter().filter(|(_, machine)| machine.exists).map(|(name, _)| name.clone()).collect();
        must!(found == expected, "the machines are {found:?} instead of {expected:?}");
        for (name, machine) in &self.machines {
            let head = repository.head(&name.as_str().into()).saying("head")?;
            must!(head.is_some() == machine.exists, "{name}: it exists, or not, against the oracle");
            let Some(head) = head else { continue };
            must!(head.record.latest_epoch == machine.latest(), "{name}: another latest epoch");
            let state = repository.state(&head, &mut |_, _| {}).saying("state")?;
            let (found, expected): (Vec<_>, Vec<_>) = (state.epochs.keys().collect(), machine.epochs.keys().collect());
            must!(found == expected, "{name}: the epochs are {found:?} instead of {expected:?}");
            must!(
                state.list.tags == machine.tags,
                "{name}: the tags are {:?}, not {:?}",
                state.list.tags,
                machine.tags
            );
        }
        Ok(())
    }

    /// A few epochs by number, tag and as the newest; and some that must not be found.
    fn check_some(&mut self, which: usize, seeded: &mut Seeded) -> Check {
        for _ in 0..2 {
            let Some((name, epoch)) = self.some_epoch(seeded) else { break };
            let opened = self.stores[which].epoch(&numbered(&name, epoch)).saying("open")?;
            let streams = self.machines[&name].epochs[&epoch].clone();
            self.check_epoch(&opened, &streams, seeded)?;
        }
        let names: Vec<String> = self.machines.keys().cloned().collect();
        let name = pick(seeded, &names).expect("there are machines");
        let (store, machine) = (&self.stores[which], &self.machines[name]);
        let number = |opened: epochfs::Result<Epoch>| opened.map(|epoch| epoch.number());
        match machine.latest() {
            0 => must_be(number(store.epoch(&latest(name))), Kind::NotFound, "the newest of none")?,
            epoch => must!(number(store.epoch(&latest(name))).saying("latest")? == epoch, "{name}@latest is another"),
        }
        if let Some(gone) = pick(seeded, &machine.gone) {
            must_be(number(store.epoch(&numbered(name, *gone))), Kind::NotFound, &format!("{name}@{gone} is gone"))?;
        }
        let tag = *pick(seeded, &TAGS).unwrap();
        let tagged = EpochName { machine: name.as_str().into(), which: Some(Which::Tag(tag.to_owned())) };
        match machine.tags.get(tag) {
            None => must_be(number(store.epoch(&tagged)), Kind::NotFound, &format!("{name}@{tag} names nothing")),
            Some(epoch) => {
                let found = number(store.epoch(&tagged)).saying(format!("{name}@{tag}"))?;
                must!(found == *epoch, "{name}@{tag} is {found} instead of {epoch}");
                Ok(())
            }
        }
    }

    fn check_epoch(&mut self, epoch: &Epoch, streams: &Streams, seeded: &mut Seeded) -> Check {
        compare_listing(epoch, streams)?;
        self.check_digests(epoch, streams)?;
        let paths: Vec<&Vec<u8>> = streams.keys().collect();
        for _ in 0..streams.len().min(3) {
            let path = *pick(seeded, &paths).expect("it is not empty");
            let image = &streams[path];
            let saying = format!("{}, stream {}", epoch.name(), path.escape_ascii());
            let mut reader = epoch.stream(path).saying(&saying)?;
            for _ in 0..4 {
                let near = pick(seeded, &image.page_numbers().take(600).collect::<Vec<_>>()).copied().unwrap_or(0);
                let offset = (near * PAGE + seeded.below(2 * PAGE)).saturating_sub(PAGE);
                let most = [10, PAGE, 5 * PAGE, LEAF + 2 * PAGE][seeded.below(4) as usize];
                let len = seeded.below(most);
                compare_bytes(&mut reader, image, offset, len as usize).saying(&saying)?;
                let (found, expected) = (reader.next_data(offset).saying(&saying)?, image.data(offset));
                must!(found == expected, "{saying}: data after {offset} at {found:?} instead of {expected:?}");
            }
        }
        Ok(())
    }

    /// Equal content has equal digests whatever its history, and other content has others.
    fn check_digests(&mut self, epoch: &Epoch, streams: &Streams) -> Check {
        let mut all = blake3::Hasher::new();
        for (path, image) in streams {
            let content = image.fingerprint();
            let digest = epoch.manifest().stream(path).expect("it was listed").digest();
            self.check_digest(content, digest).saying(format!("{}, {}", epoch.name(), path.escape_ascii()))?;
            all.update(&(path.len() as u64).to_le_bytes()).update(path).update(&content);
        }
        self.check_digest(*all.finalize().as_bytes(), epoch.commit().digest).saying(epoch.name())
    }

    fn check_digest(&mut self, content: [u8; 32], digest: Hash) -> Check {
        let before = *self.digests.entry(content).or_insert(digest);
        must!(before == digest, "equal content has different digests");
        let other = *self.contents.entry(digest).or_insert(content);
        must!(other == content, "different content has equal digests");
        Ok(())
    }

    /// Everything, through stores that know nothing yet.
    pub fn check_all(&mut self) -> Check {
        self.reopen(0)?;
        self.reopen(1)?;
        self.check_lists(0)?;
        let machines = self.machines.clone();
        for (name, machine) in &machines {
            for (number, streams) in &machine.epochs {
                let epoch = self.stores[0].epoch(&numbered(name, *number)).saying("open")?;
                compare(&epoch, streams)?;
                self.check_digests(&epoch, streams)?;
            }
            for gone in &machine.gone {
                let opened = self.stores[0].epoch(&numbered(name, *gone)).map(|epoch| epoch.number());
                must_be(opened, Kind::NotFound, &format!("{name}@{gone} is gone"))?;
            }
            if let Some((number, streams)) = machine.epochs.iter().next_back() {
                self.check_export(&numbered(name, *number), streams)?;
            }
        }
        let verified = self.stores[1].verify(&mut |_, _| {}).saying("verify")?;
        must!(verified.is_whole(), "verify finds {:?} {:?}", verified.problems, verified.broken_epochs);
        must!(verified.unknown_objects.is_empty(), "verify does not know {:?}", verified.unknown_objects);
        let epochs: usize = machines.values().map(|machine| machine.epochs.len()).sum();
        must!(verified.epochs == epochs as u64, "verify followed {} of {epochs} epochs", verified.epochs);
        Ok(())
    }

    fn check_export(&mut self, name: &EpochName, streams: &Streams) -> Check {
        if streams.values().any(|image| image.length > 1 << 42) {
            return Ok(());
        }
        self.files += 1;
        let target = self.directory.path().join(format!("export{}", self.files));
        let epoch = self.stores[0].epoch(name).saying("open")?;
        epochfs::epoch::export(&epoch, &[], &target, &|_| {}).saying("export")?;
        for (path, image) in streams {
            let file = target.join(std::ffi::OsStr::from_bytes(path));
            compare_file(&file, image).saying(format!("{}, exported {}", epoch.name(), path.escape_ascii()))?;
        }
        std::fs::remove_dir_all(&target).saying("cleaning up")
    }
}

/// A small file is compared whole; of a large one the data, and that it takes no more room than that.
fn compare_file(path: &std::path::Path, image: &Image) -> Check {
    let file = std::fs::File::open(path).saying("open")?;
    let metadata = file.metadata().saying("metadata")?;
    must!(metadata.len() == image.length, "it has {} bytes instead of {}", metadata.len(), image.length);
    if image.length <= 1 << 23 {
        must!(std::fs::read(path).saying("read")? == image.bytes(), "it has other bytes");
        return Ok(());
    }
    must!(metadata.blocks() * 512 <= image.page_numbers().count() as u64 * PAGE + (1 << 20), "its holes are filled");
    for number in image.page_numbers() {
        let mut page = [0; PAGE as usize];
        let kept = (image.length - number * PAGE).min(PAGE) as usize;
        file.read_exact_at(&mut page[..kept], number * PAGE).saying("read")?;
        must!(page == image.page(number), "page {number} has other bytes");
    }
    Ok(())
}

/// What a commit tells about itself: as many pages as differ from the parent's streams of the same names.
fn check_counts(committed: &Committed, streams: &Streams, before: &Streams) -> Check {
    let empty = Image::default();
    let differing =
        |(path, image): (&Vec<u8>, &Image)| image.differing(before.get(path).unwrap_or(&empty)).total() / PAGE;
    let expected: u64 = streams.iter().map(differing).sum();
    let counts = &committed.counts;
    must!(counts.changed_pages == expected, "it counts {} changed pages, not {expected}", counts.changed_pages);
    let stored = counts.new_pages + counts.deduplicated_pages;
    must!(stored <= expected, "it stored {stored} pages of {expected} that changed");
    Ok(())
}

fn must_be<T>(result: epochfs::Result<T>, kind: Kind, what: &str) -> Check {
    match result {
        Ok(_) => Err(format!("{what}: it succeeded")),
        Err(error) if error.kind() == kind => Ok(()),
        Err(error) => Err(format!("{what}: {:?} instead of {kind:?}: {error}", error.kind())),
    }
}

/// Adds a stream in one of the many ways there are.
fn add(
    commit: &mut CommitBuilder,
    path: &[u8],
    image: &Image,
    before: Option<&Image>,
    seeded: &mut Seeded,
    directory: &tempfile::TempDir,
    files: &mut u64,
) -> Check {
    let attributes = Attributes::default();
    let exact = image.differing(before.unwrap_or(&Image::default()));
    match seeded.below(7) {
        0 if before == Some(image) => commit.keep_stream(path),
        0 | 1 if before.is_some() => {
            // Ranges are in bytes, and may say too much.
            let mut dirty: Vec<_> = exact.iter().cloned().collect();
            let end = image.length.max(before.map_or(0, |before| before.length));
            for _ in 0..seeded.below(3) {
                let start = seeded.below(end.max(1));
                if start < end {
                    dirty.push(start..start + seeded.below(3 * PAGE));
                }
            }
            let dirty = Ranges::new(dirty);
            let source = ImageSource::only(image.clone(), &dirty, before.map_or(0, |before| before.length));
            commit.add_stream(path, attributes, &source, Some(&dirty))
        }
        2 | 3 => {
            // As a VMM hands pages over: those that were written since the parent, and nothing else.
            let mut source = PagesSource::new("pages", image.length);
            for number in exact.iter().flat_map(|range| range.start / PAGE..range.end / PAGE) {
                if number * PAGE < image.length {
                    source.write(number, &image.page(number)).saying("PagesSource::write")?;
                }
            }
            let dirty = source.dirty();
            commit.add_stream(path, attributes, &source, before.map(|_| &dirty))
        }
        4 if image.length <= 8 * LEAF => {
            commit.add_stream(path, attributes, &BytesSource::new("bytes", image.bytes()), None)
        }
        5 if image.length <= 1 << 41 => {
            *files += 1;
            let file = directory.path().join(format!("source{files}"));
            write_sparse(&file, image).saying("writing a file to commit")?;
            let source = FileSource::open(&file).saying("FileSource::open")?;
            let added = if before.is_some() && seeded.chance(500) {
                commit.add_stream(path, attributes, &source, Some(&exact))
            } else {
                commit.add_stream(path, source.attributes(), &source, None)
            };
            std::fs::remove_file(&file).saying("cleaning up")?;
            added
        }
        _ => commit.add_stream(path, attributes, &ImageSource::new(image.clone()), None),
    }
    .saying("adding it")
}

fn write_sparse(path: &std::path::Path, image: &Image) -> std::io::Result<()> {
    use std::os::unix::fs::FileExt;
    let file = std::fs::File::create(path)?;
    file.set_len(image.length)?;
    for number in image.page_numbers() {
        let kept = (image.length - number * PAGE).min(PAGE) as usize;
        file.write_all_at(&image.page(number)[..kept], number * PAGE)?;
    }
    Ok(())
}

/// Every way to lose an index.
fn harm(state: &std::path::Path, seeded: &mut Seeded) -> std::io::Result<()> {
    let mut files = Vec::new();
    let mut directories = vec![state.to_owned()];
    while let Some(directory) = directories.pop() {
        for entry in std::fs::read_dir(directory).into_iter().flatten() {
            let entry = entry?;
            if entry.file_type()?.is_dir() { &mut directories } else { &mut files }.push(entry.path());
        }
    }
    files.sort();
    if seeded.below(4) == 0 || files.is_empty() {
        match std::fs::remove_dir_all(state) {
            Err(error) if error.kind() != std::io::ErrorKind::NotFound => return Err(error),
            _ => return Ok(()),
        }
    }
    for _ in 0..=seeded.below(3) {
        let Some(file) = pick(seeded, &files) else { break };
        let Ok(mut bytes) = std::fs::read(file) else { continue };
        match seeded.below(4) {
            0 => std::fs::remove_file(file)?,
            1 => std::fs::write(file, &bytes[..seeded.below(bytes.len() as u64 + 1) as usize])?,
            _ => {
                for _ in 0..8 {
                    if !bytes.is_empty() {
                        let at = seeded.below(bytes.len() as u64) as usize;
                        bytes[at] ^= 1 << seeded.below(8);
                    }
                }
                std::fs::write(file, bytes)?;
            }
        }
    }
    Ok(())
}
