//! Committing: streams in, an epoch out.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex, RwLock};

use epochfs_format::{
    Attributes, BLOCK_HEADER_LEN, Body, Commit, EntryKind, HEADER_LEN, IMAGE_LEN_MAX, INLINE_MANIFEST_LEN_MAX, Image,
    Manifest, ManifestEntry, ManifestPlace, ObjectRef, Owner, Place, Record, Root, check_stream_path, check_tag,
};

use super::edit::NewRoot;
use super::leaf::{Shared, Worker};
use super::moves::Moves;
use super::nodes::Nodes;
use super::pipeline::{CommitCounts, StreamJob, commit_stream};
use super::ranges::Ranges;
use super::source::{BytesSource, Source};
use super::view::{commit_of, load_manifest};
use crate::error::{Error, Kind, Result};
use crate::platform::lock::lock;
use crate::platform::memory::SpareBuffers;
use crate::repo::{Birth, Draft, FIRST_TERM, Head, Index, Inline, PackWriter, Rebase, Repository, object_key};

/// How to commit. Plain data.
#[derive(Clone, Debug)]
pub struct CommitOptions {
    pub message: String,
    pub tags: Vec<String>,
    /// What the writer says about the epoch: CPU features, the VMM's version, and the like.
    pub notes: Vec<(String, String)>,
    /// The zstd level for new pages.
    pub compression_level: i32,
    /// Threads that hash and compress; 0 for one a processor.
    pub threads: usize,
    /// The epoch that the dirty ranges are relative to: the commit fails if another one is the newest.
    pub parent: Option<u64>,
    /// The term under which the caller owns the machine.
    pub term: Option<u64>,
    /// A commit with at most this many bytes of blocks is carried by its record, and has no packs; or with as many as suits the
    /// store.
    pub inline_len_max: Option<usize>,
    /// Ends another owner's term. Only right when that owner is known to be dead.
    pub take_over: bool,
    /// What the record says its writer is, for a caller who may have to find out later whether it arrived.
    pub writer: Option<[u8; 16]>,
    /// What is stored again at another place, of streams that are added with what is dirty of them.
    pub moves: Option<Arc<Moves>>,
}

impl Default for CommitOptions {
    fn default() -> Self {
        Self {
            message: String::new(),
            tags: Vec::new(),
            notes: Vec::new(),
            compression_level: -1,
            threads: 0,
            parent: None,
            term: None,
            inline_len_max: None,
            take_over: false,
            writer: None,
            moves: None,
        }
    }
}

/// What a commit made.
#[derive(Clone, Debug)]
pub struct Committed {
    pub machine: Arc<str>,
    pub epoch: u64,
    pub record: Record,
    pub counts: CommitCounts,
    /// Bytes of all objects written for it.
    pub stored_bytes: u64,
}

impl Committed {
    /// What is known of a commit from its record alone.
    pub(super) fn of_record(record: Record) -> Result<Self> {
        let commit = commit_of(&record)?;
        let counts = CommitCounts {
            changed_pages: commit.changed_pages,
            new_pages: commit.new_pages,
            ..CommitCounts::default()
        };
        let (machine, epoch, stored_bytes) = (record.machine.clone(), record.seq, commit.stored_len);
        Ok(Self { machine, epoch, counts, stored_bytes, record })
    }
}

/// A file of the epoch whose tree is not stored yet.
struct PendingStream {
    path: Vec<u8>,
    attributes: Attributes,
    length: u64,
    root: NewRoot,
}

/// An epoch being made. Dropping it leaves the machine as it was.
pub struct CommitBuilder {
    repository: Repository,
    machine: Arc<str>,
    options: CommitOptions,
    head: Option<Head>,
    /// The newest condemnation that it heeds: nothing that was condemned until then is referred to.
    heeded: u64,
    /// Tells the collector of this commit where there is no log yet that could hold a barrier.
    birth: Option<Birth>,
    parent: Option<(Record, Arc<Manifest>)>,
    packs: PackWriter<'static>,
    workers: Vec<Worker>,
    shared: Shared,
    streams: Vec<PendingStream>,
    others: Vec<ManifestEntry>,
    /// Whether something could not be added: such an epoch would not be whole, and is never finished.
    failed: bool,
    /// The paths of all of them, and whether they are directories.
    taken: BTreeMap<Vec<u8>, bool>,
    counts: CommitCounts,
    on_read: Box<dyn FnMut(u64) + Send>,
}

impl CommitBuilder {
    pub(super) fn begin(
        repository: Repository,
        nodes: Arc<Nodes>,
        index: Arc<Index>,
        machine: Arc<str>,
        options: CommitOptions,
    ) -> Result<Self> {
        for tag in &options.tags {
            check_tag(tag).map_err(|error| Error::usage(format!("{tag:?}: {error}")))?;
        }
        for (name, value) in &options.notes {
            if options.notes.iter().filter(|(other, _)| other == name).count() > 1 {
                return Err(Error::usage(format!("the note {name:?} is given twice")));
            }
            if name.is_empty() || name.len() > 255 || value.len() > 64 << 10 {
                return Err(Error::usage(format!("note {name:?}: its name may have 1 to 255 bytes, its value 64 KiB")));
            }
        }
        if options.message.len() > 64 << 10 || options.notes.len() > 1000 || options.tags.len() > 1000 {
            return Err(Error::usage("an epoch takes a message of at most 64 KiB, and at most 1,000 tags and notes"));
        }
        repository.check_room()?;
        repository.objects().look_for_quarantined()?;
        // The owner knows its machine's newest record. Should another have come, the put of the next one will show it.
        let known = options.term.and_then(|term| repository.known_head(&machine, term));
        let head = match known {
            Some(head) => Some(head),
            None => repository.log_head(&machine)?,
        };
        if let Some(head) = &head {
            check_ownership(&head.record, &options)?;
        }
        let log = repository.collector_log().clone();
        let birth = head.is_none().then(|| log.announce_birth(&machine)).transpose()?;
        let heeded = match &head {
            Some(head) => log.heed(head.record.generation)?,
            None => log.heed_newest()?,
        };
        let exists = head.as_ref().filter(|head| head.record.machine_exists());
        let parent = match exists.map(|head| repository.latest_of(head)).transpose()?.flatten() {
            Some(record) => {
                let manifest = load_manifest(&nodes, commit_of(&record)?)
                    .map_err(|error| error.context(format!("{machine}@{}", record.seq)))?;
                Some((record, Arc::new(manifest)))
            }
            None => None,
        };
        if let Some(expected) = options.parent {
            let newest = parent.as_ref().map_or(0, |(record, _)| record.seq);
            if newest != expected {
                return Err(not_the_parent(&machine, newest, expected));
            }
        }
        let threads = match options.threads {
            0 => std::thread::available_parallelism().map_or(1, usize::from).min(16),
            threads => threads.min(64),
        };
        let learner = index.clone();
        let mut packs = PackWriter::new(
            repository.objects().clone(),
            Box::new(move |object, footer| {
                learner.learn(object, footer);
                Ok(())
            }),
        );
        if let Some(len) = options.inline_len_max {
            packs = packs.with_inline_len_max(len);
        }
        Ok(Self {
            workers: (0..threads).map(|_| Worker::new(options.compression_level)).collect(),
            shared: Shared {
                nodes,
                index,
                condemned: log,
                found_in: Mutex::default(),
                recent: RwLock::default(),
                spare: SpareBuffers::new(usize::MAX, usize::MAX),
                made: Mutex::default(),
                moves: options.moves.clone(),
            },
            streams: Vec::new(),
            others: Vec::new(),
            taken: BTreeMap::new(),
            failed: false,
            counts: CommitCounts::default(),
            on_read: Box::new(|_| {}),
            repository,
            machine,
            options,
            head,
            heeded,
            birth,
            parent,
            packs,
        })
    }

    /// Called with the number of bytes read from a source, again and again.
    pub fn on_read(&mut self, on_read: impl FnMut(u64) + Send + 'static) {
        self.on_read = Box::new(on_read);
    }

    /// The epoch that this one is compared with, or 0.
    pub fn parent(&self) -> u64 {
        self.parent.as_ref().map_or(0, |(record, _)| record.seq)
    }

    /// Adds a stream, all of it, or only what `dirty` says may differ from the parent epoch's stream of this name.
    /// Where there is no such stream all of it is read.
    pub fn add_stream(
        &mut self,
        path: &[u8],
        attributes: Attributes,
        source: &dyn Source,
        dirty: Option<&Ranges>,
    ) -> Result<()> {
        let parent = self.parent.as_ref().and_then(|(_, manifest)| manifest.stream(path)).cloned();
        self.add_stream_with(path, attributes, source, dirty, parent.as_ref())
    }

    /// Adds a stream that differs from a stored image, wherever that image comes from, only where `dirty` says so.
    pub fn add_stream_over(
        &mut self,
        path: &[u8],
        attributes: Attributes,
        source: &dyn Source,
        dirty: &Ranges,
        base: &Image,
    ) -> Result<()> {
        if let Some(root) = &base.root {
            self.settle_unless_of_parent(path, root)?;
        }
        self.add_stream_with(path, attributes, source, Some(dirty), Some(base))
    }

    fn add_stream_with(
        &mut self,
        path: &[u8],
        attributes: Attributes,
        source: &dyn Source,
        dirty: Option<&Ranges>,
        parent: Option<&Image>,
    ) -> Result<()> {
        // Until it succeeds: whatever ends it early leaves packs half written and the epoch without the stream.
        let failed_before = std::mem::replace(&mut self.failed, true);
        self.take_path(path, false)?;
        if source.len() > IMAGE_LEN_MAX {
            return Err(Error::usage(format!("{}: no file is {} bytes long", path.escape_ascii(), source.len())));
        }
        let end = source.len().max(parent.map_or(0, |image| image.length));
        if let Some(range) = dirty.and_then(|dirty| dirty.iter().find(|range| range.start >= end)) {
            // Page numbers taken for bytes, or the other way round: what is really dirty would be lost.
            return Err(Error::usage(format!(
                "{}: the dirty range at {} lies past the end of {end} bytes",
                path.escape_ascii(),
                range.start
            ))
            .hint("ranges are OFFSET LENGTH in bytes"));
        }
        let job = StreamJob { source, dirty, parent };
        let root =
            commit_stream(&job, &self.shared, &mut self.workers, &mut self.packs, &mut self.counts, &mut self.on_read)
                .map_err(|error| error.context(format!("stream {}", path.escape_ascii())))?;
        tracing::debug!(stream = %path.escape_ascii(), "stream is read");
        self.streams.push(PendingStream { path: path.to_vec(), attributes, length: source.len(), root });
        self.failed = failed_before;
        Ok(())
    }

    /// Adds a stream from memory.
    pub fn add_bytes(&mut self, name: &str, bytes: impl Into<Arc<[u8]>>) -> Result<()> {
        let attributes = Attributes { mode: 0o600, ..Attributes::default() };
        self.add_stream(name.as_bytes(), attributes, &BytesSource::new(name, bytes), None)
    }

    /// Takes a stream over from the parent epoch as it is.
    pub fn keep_stream(&mut self, path: &[u8]) -> Result<()> {
        let failed_before = std::mem::replace(&mut self.failed, true);
        let entry = self.parent.as_ref().and_then(|(_, manifest)| manifest.get(path)).cloned().ok_or_else(|| {
            Error::not_found(format!("{}@{} has no stream {}", self.machine, self.parent(), path.escape_ascii()))
        })?;
        self.take_path(path, entry.kind == EntryKind::Directory)?;
        self.others.push(entry);
        self.failed = failed_before;
        Ok(())
    }

    /// Adds a directory or a symbolic link, or a stream that is stored already.
    pub fn add_entry(&mut self, entry: ManifestEntry) -> Result<()> {
        let failed_before = std::mem::replace(&mut self.failed, true);
        self.take_path(&entry.path, entry.kind == EntryKind::Directory)?;
        if let EntryKind::Stream(Image { root: Some(root), .. }) = &entry.kind {
            self.settle_unless_of_parent(&entry.path, root)?;
        }
        self.others.push(entry);
        self.failed = failed_before;
        Ok(())
    }

    /// What the parent epoch holds is durable; anything else that this epoch is to lean on is made so.
    fn settle_unless_of_parent(&self, path: &[u8], root: &Root) -> Result<()> {
        let of_parent = self.parent.as_ref().and_then(|(_, manifest)| manifest.stream(path));
        if of_parent.and_then(|image| image.root.as_ref()) == Some(root) {
            return Ok(());
        }
        self.repository.objects().store().settle(&object_key(&root.place.object))
    }

    /// What the parent epoch holds.
    pub(super) fn parent_manifest(&self) -> Option<&Arc<Manifest>> {
        self.parent.as_ref().map(|(_, manifest)| manifest)
    }

    /// What the parent epoch has at a path.
    pub fn parent_entry(&self, path: &[u8]) -> Option<&ManifestEntry> {
        self.parent.as_ref().and_then(|(_, manifest)| manifest.get(path))
    }

    /// Notes that the epoch has something at this path. Only a directory may have anything below it.
    fn take_path(&mut self, path: &[u8], is_directory: bool) -> Result<()> {
        check_stream_path(path).map_err(|error| Error::usage(format!("{}: {error}", path.escape_ascii())))?;
        let in_the_way = |file: &[u8], below: &[u8]| {
            let (file, below) = (file.escape_ascii(), below.escape_ascii());
            Err(Error::usage(format!("{below} cannot be, because {file} is no directory")))
        };
        let parents = path.iter().enumerate().filter(|(_, byte)| **byte == b'/').map(|(at, _)| &path[..at]);
        for parent in parents {
            if self.taken.get(parent) == Some(&false) {
                return in_the_way(parent, path);
            }
        }
        let prefix = [path, b"/"].concat();
        let first_below = self.taken.range(prefix.clone()..).next().filter(|(other, _)| other.starts_with(&prefix));
        if let (Some((below, _)), false) = (first_below, is_directory) {
            return in_the_way(path, below);
        }
        if self.taken.insert(path.to_vec(), is_directory).is_some() {
            return Err(Error::usage(format!("the stream {} is given twice", path.escape_ascii())));
        }
        Ok(())
    }

    /// Makes the epoch durable. When this returns, it is committed. An epoch to which something could not be added
    /// is refused.
    pub fn finish(mut self) -> Result<Committed> {
        if self.failed {
            return Err(Error::usage("something could not be added to this epoch, so that it would not be whole")
                .hint("nothing was committed; begin a new commit"));
        }
        let inline_manifest = self.manifest_len_max()? <= INLINE_MANIFEST_LEN_MAX;
        let streams = std::mem::take(&mut self.streams);
        let mut entries = std::mem::take(&mut self.others);
        let (packs, inline, manifest_place, manifest) = if inline_manifest {
            let packs = std::mem::replace(&mut self.packs, unused_packs(&self.repository));
            let (packs, mut inline) = packs.finish(true)?;
            tracing::debug!(packs = packs.len(), "packs are durable");
            for stream in streams {
                let root = stream.root.put_in_record(&mut inline, &self.shared);
                entries.push(stream_entry(stream.path, stream.attributes, stream.length, root));
            }
            let manifest = manifest_of(entries)?;
            (packs, inline, ManifestPlace::Inline(manifest.clone()), manifest)
        } else {
            for stream in streams {
                let root = stream.root.put_in_pack(&mut self.packs, &self.shared)?;
                entries.push(stream_entry(stream.path, stream.attributes, stream.length, root));
            }
            let manifest = manifest_of(entries)?;
            let (image, packs, inline) = self.store_manifest(&manifest)?;
            (packs, inline, ManifestPlace::Image(image), manifest)
        };
        self.append(packs, inline, manifest_place, &manifest)
    }

    /// How long the manifest may become: as if every new root lay in a pack, whose name is the longest of a new place.
    fn manifest_len_max(&self) -> Result<usize> {
        let mut entries = self.others.clone();
        for stream in &self.streams {
            let root = match &stream.root {
                NewRoot::Empty => None,
                NewRoot::Stored(root) => Some(root.clone()),
                NewRoot::New(new) => {
                    let object = epochfs_format::ObjectRef::Pack([0; 16]);
                    let place = Place { object, offset: HEADER_LEN as u32, len: BLOCK_HEADER_LEN as u32 + 1 };
                    Some(Root { digest: new.digest(), place })
                }
            };
            entries.push(stream_entry(stream.path.clone(), stream.attributes.clone(), stream.length, root));
        }
        Ok(manifest_of(entries)?.encode(None).len())
    }

    /// Stores a large manifest as a byte image, so that what did not change since the parent's is shared.
    fn store_manifest(&mut self, manifest: &Manifest) -> Result<(Image, Vec<([u8; 16], u64)>, Inline)> {
        let source = BytesSource::new("manifest", manifest.encode(None));
        let parent = self.parent.as_ref().and_then(|(record, _)| match &commit_of(record).ok()?.manifest {
            ManifestPlace::Image(image) => Some(image.clone()),
            ManifestPlace::Inline(_) => None,
        });
        let job = StreamJob { source: &source, dirty: None, parent: parent.as_ref() };
        let mut ignored = CommitCounts::default();
        let root = commit_stream(&job, &self.shared, &mut self.workers, &mut self.packs, &mut ignored, &mut |_| {})?;
        let packs = std::mem::replace(&mut self.packs, unused_packs(&self.repository));
        // The streams' roots are named by the packs they lie in, so these must be packs.
        let (packs, mut inline) = packs.finish(false)?;
        let root = root.put_in_record(&mut inline, &self.shared);
        Ok((Image { length: source.len(), root }, packs, inline))
    }

    fn append(
        mut self,
        packs: Vec<([u8; 16], u64)>,
        inline: Inline,
        manifest_place: ManifestPlace,
        manifest: &Manifest,
    ) -> Result<Committed> {
        let pack_bytes: u64 = packs.iter().map(|(_, len)| len).sum();
        let base_term = self.head.as_ref().map_or(FIRST_TERM, |head| head.record.term);
        let (term, owner) = next_term(self.head.as_ref().map(|head| &head.record), &self.options);
        let commit = Commit {
            parent: self.parent(),
            origin: None,
            digest: manifest.digest(),
            logical_len: manifest.logical_len(),
            changed_pages: self.counts.changed_pages,
            new_pages: self.counts.new_pages,
            stored_len: pack_bytes + inline.blocks().len() as u64,
            packs,
            tags: self.options.tags.clone(),
            message: self.options.message.clone(),
            notes: self.options.notes.clone(),
            manifest: manifest_place,
        };
        let (footer, own) = (inline.footer.clone(), inline.own.clone());
        let mut referred = std::mem::take(&mut *lock(&self.shared.found_in));
        referred.extend(commit.packs.iter().map(|(id, _)| ObjectRef::Pack(*id)));
        let draft = Draft {
            term,
            owner,
            latest_epoch: 0,
            generation: self.heeded,
            body: Body::Commit(commit),
            inline,
            writer: self.options.writer,
        };
        let (machine, options, parent) = (&self.machine, &self.options, self.parent());
        let begun_in = self.head.as_ref().map_or(0, |head| head.record.generation);
        let (mut heeded, mut parent_is_dropped) = (self.heeded, false);
        self.birth.iter_mut().for_each(Birth::set_out);
        let head = self.repository.append(machine, self.head.clone(), draft, &mut |record, draft| {
            let rebase = after_other(record, base_term, machine, options);
            parent_is_dropped |= matches!(&record.body, Body::Drop { epochs } if epochs.contains(&parent));
            if matches!(rebase, Rebase::After) {
                let log = self.repository.collector_log();
                // What the parent refers to was in use at a barrier if the parent still was an epoch then.
                if (parent_is_dropped && record.generation > begun_in)
                    || log.condemned_between(heeded, record.generation, &referred)?
                {
                    return Ok(Rebase::Refuse(condemned(machine)));
                }
                heeded = heeded.max(record.generation);
            }
            // An owner that gave the machine up meanwhile does not get it back by this.
            if record.owner.is_none() {
                draft.owner = None;
            }
            Ok(rebase)
        })?;
        tracing::debug!(epoch = head.record.seq, "record is durable");
        self.birth.take().into_iter().for_each(Birth::arrived);
        let object = ObjectRef::Record { machine: machine.clone(), seq: head.record.seq };
        self.shared.nodes.keep(std::mem::take(&mut *lock(&self.shared.made)), &own, &object);
        if footer.block_count() > 0 {
            self.shared.index.learn(&object, &footer);
        }
        let stored_bytes = commit_of(&head.record)?.stored_len;
        Ok(Committed {
            machine: machine.clone(),
            epoch: head.record.seq,
            record: head.record,
            counts: self.counts,
            stored_bytes,
        })
    }
}

fn unused_packs(repository: &Repository) -> PackWriter<'static> {
    PackWriter::new(repository.objects().clone(), Box::new(|_, _| Ok(())))
}

/// What cannot go together is the caller's mistake, not damage.
fn manifest_of(entries: Vec<ManifestEntry>) -> Result<Manifest> {
    Manifest::new(entries).map_err(|error| Error::usage(error.to_string()))
}

fn stream_entry(path: Vec<u8>, attributes: Attributes, length: u64, root: Option<Root>) -> ManifestEntry {
    ManifestEntry { path, attributes, kind: EntryKind::Stream(Image { length, root }) }
}

fn not_the_parent(machine: &str, newest: u64, expected: u64) -> Error {
    Error::conflict(format!("the newest epoch of {machine} is {newest}, and not {expected}"))
        .hint("nothing was committed: what changed since another epoch would be missed")
}

fn lost_race(machine: &str, newest: u64) -> Error {
    Error::conflict(format!("another writer committed to {machine} first: its newest epoch is {newest}"))
        .hint("nothing was committed; look at the new epoch and repeat")
}

fn condemned(machine: &str) -> Error {
    Error::conflict(format!("what this commit to {machine} refers to was condemned as garbage while it was made"))
        .hint("nothing was committed; repeat")
}

/// Whether these options may commit after this record.
fn check_ownership(record: &Record, options: &CommitOptions) -> Result<()> {
    match (options.term, &record.owner) {
        (Some(term), _) if term != record.term => Err(fenced(&record.machine, record)),
        (Some(_), _) | (None, None) => Ok(()),
        (None, Some(_)) if options.take_over => Ok(()),
        (None, Some(owner)) => Err(owned(&record.machine, owner)),
    }
}

fn fenced(machine: &str, record: &Record) -> Error {
    let now = record.owner.as_ref().map_or("nobody".to_owned(), |owner| format!("host {}", owner.name));
    Error::new(Kind::Fenced, format!("{machine} was taken over: term {} belongs to {now}", record.term))
        .hint("this owner must stop its VM; nothing was committed")
}

fn owned(machine: &str, owner: &Owner) -> Error {
    Error::conflict(format!("{machine} is owned by host {}", owner.name)).hint(
        "commit through that host; or, if it is certainly dead, end its term with --take-over: it can then never commit again",
    )
}

/// Term and owner of the new record.
fn next_term(head: Option<&Record>, options: &CommitOptions) -> (u64, Option<Owner>) {
    match head {
        None => (FIRST_TERM, None),
        Some(record) if options.term.is_none() && record.owner.is_some() => (record.term + 1, None),
        Some(record) => (record.term, record.owner.clone()),
    }
}

/// Whether a commit that began in this term may go behind a record that came first.
fn after_other(record: &Record, base_term: u64, machine: &str, options: &CommitOptions) -> Rebase {
    match &record.body {
        Body::Commit(_) if record.term == base_term => Rebase::Refuse(lost_race(machine, record.seq)),
        Body::Remove => Rebase::Refuse(Error::conflict(format!("{machine} was removed meanwhile"))),
        _ if record.term == base_term => Rebase::After,
        _ if options.term.is_some() => Rebase::Refuse(fenced(machine, record)),
        _ => {
            Rebase::Refuse(Error::conflict(format!("{machine} was taken over meanwhile")).hint("nothing was committed"))
        }
    }
}
