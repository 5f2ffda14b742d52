//! Log records: the numbered facts that a machine's history is made of. Creating the next one is the commit.

use std::sync::Arc;

use crate::block::{BLOCK_PAYLOAD_LEN_MAX, Block, BlockKind, put_raw_block};
use crate::error::{FormatError, Result, invalid};
use crate::manifest::{Image, Manifest};
use crate::name::{check_machine, check_tag};
use crate::page::Hash;
use crate::reference::ObjectRef;
use crate::wire::{Put, Reader};

const WHAT: &str = "log record";

/// Set in the kind of a record that states a generation: one written before garbage was ever collected takes no room
/// for it.
const WITH_GENERATION: u8 = 0x80;

/// The largest manifest that a record carries itself; a larger one is stored as an image.
pub const INLINE_MANIFEST_LEN_MAX: usize = 16 << 10;

/// Who may commit to a machine: nobody in particular, or one owner until a later term.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Owner {
    /// The owning host's id.
    pub host: [u8; 16],
    /// The owning host's name, for people.
    pub name: String,
    /// How long the owner may go on without renewing.
    pub lease_ms: u32,
}

/// What every record says.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Record {
    pub machine: Arc<str>,
    pub seq: u64,
    /// The generation of ownership; it never falls.
    pub term: u64,
    pub owner: Option<Owner>,
    /// Random, unique for this attempt to write the record: whoever reads its own id back has won.
    pub writer: [u8; 16],
    /// When it was written, by the writer's clock, in nanoseconds since 1970. For people only.
    pub time_ns: u64,
    /// The digest of the record before this one, zeros for the first.
    pub previous: Hash,
    /// The newest epoch once this record is in the log, or 0.
    pub latest_epoch: u64,
    /// The newest record before this one that is an edit (see [`Record::is_edit`]), or 0. Whoever asks whether an
    /// epoch was dropped, or what a tag names, follows these and need not read the other records.
    pub last_edit: u64,
    /// The newest condemnation of the garbage collector that this log heeds: the number of its record in the
    /// collector's log, or 0. It never falls.
    pub generation: u64,
    pub body: Body,
}

/// What a record does.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(clippy::large_enum_variant, reason = "most records are commits, and few are in memory at a time")]
pub enum Body {
    /// The machine exists, without an epoch yet, or again after it was removed.
    Create,
    /// A new epoch, whose number is the record's.
    Commit(Commit),
    /// Ownership changed.
    Term,
    /// A name for an epoch; it moves from any epoch that had it.
    Tag {
        epoch: u64,
        name: String,
    },
    Untag {
        name: String,
    },
    /// These epochs, in order, are no longer part of the machine.
    Drop {
        epochs: Vec<u64>,
    },
    /// The machine and all its epochs are gone. The log stays, so that no number is ever used twice.
    Remove,
    /// Nothing changed but the generation: whoever is about to append has this record in the way, and learns what was
    /// condemned. Whether the machine exists is as it was.
    Barrier {
        exists: bool,
    },
}

impl Body {
    /// The record's kind in a word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Create => "create",
            Self::Commit(_) => "commit",
            Self::Term => "term",
            Self::Tag { .. } => "tag",
            Self::Untag { .. } => "untag",
            Self::Drop { .. } => "drop",
            Self::Remove => "remove",
            Self::Barrier { .. } => "barrier",
        }
    }
}

/// An epoch.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Commit {
    /// The epoch it was compared with, or 0.
    pub parent: u64,
    /// The machine and epoch it is a clone of.
    pub origin: Option<(Arc<str>, u64)>,
    /// The logical digest of the manifest.
    pub digest: Hash,
    /// The sum of the streams' lengths.
    pub logical_len: u64,
    /// Pages that differ from the parent's.
    pub changed_pages: u64,
    /// Pages that no pack held before.
    pub new_pages: u64,
    /// Bytes written for it, this record excluded.
    pub stored_len: u64,
    /// The packs written for it, with their lengths.
    pub packs: Vec<([u8; 16], u64)>,
    pub tags: Vec<String>,
    pub message: String,
    /// What writers say about the epoch: CPU features, the VMM's version, and the like.
    pub notes: Vec<(String, String)>,
    pub manifest: ManifestPlace,
}

/// Where the manifest is.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum ManifestPlace {
    /// In the record.
    Inline(Manifest),
    /// Stored as a byte image, like a stream.
    Image(Image),
}

impl Record {
    /// Whether the record changes which epochs exist or what tags name, other than by adding an untagged epoch.
    pub fn is_edit(&self) -> bool {
        match &self.body {
            Body::Create | Body::Term | Body::Barrier { .. } => false,
            Body::Commit(commit) => !commit.tags.is_empty(),
            Body::Tag { .. } | Body::Untag { .. } | Body::Drop { .. } | Body::Remove => true,
        }
    }

    /// Whether the machine exists once this record is in its log.
    pub fn machine_exists(&self) -> bool {
        !matches!(self.body, Body::Remove | Body::Barrier { exists: false })
    }

    /// Refuses a record that could not be written, or that no reader would take. Whoever fills a record with what
    /// comes from outside asks this before `put_block`.
    pub fn check(&self) -> Result<()> {
        check_machine(&self.machine)?;
        let refuse = |why| Err(FormatError::Name { what: WHAT, why });
        if self.owner.as_ref().is_some_and(|owner| owner.name.len() > usize::from(u8::MAX)) {
            return refuse("its owner's name is longer than 255 bytes");
        }
        match &self.body {
            Body::Commit(commit) => {
                if let Some((machine, _)) = &commit.origin {
                    check_machine(machine)?;
                }
                for tag in &commit.tags {
                    check_tag(tag)?;
                }
                if commit.tags.len().max(commit.notes.len()) > usize::from(u16::MAX) {
                    return refuse("it has more than 65,535 tags or notes");
                }
                if commit.notes.iter().any(|(name, _)| name.len() > usize::from(u8::MAX)) {
                    return refuse("a note's name is longer than 255 bytes");
                }
                if let ManifestPlace::Image(image) = &commit.manifest {
                    image.check()?;
                }
                if self.len_at_most() > BLOCK_PAYLOAD_LEN_MAX {
                    return refuse("it would be longer than 16 MiB");
                }
            }
            Body::Tag { name, .. } | Body::Untag { name } => check_tag(name)?,
            Body::Drop { epochs } if epochs.len() > BLOCK_PAYLOAD_LEN_MAX / 16 => {
                return refuse("it drops more than a million epochs");
            }
            Body::Drop { .. } | Body::Create | Body::Term | Body::Remove | Body::Barrier { .. } => {}
        }
        self.check_numbers()
    }

    /// A bound of a commit's encoded length that costs no copy of what may be long.
    fn len_at_most(&self) -> usize {
        let Body::Commit(commit) = &self.body else { return 0 };
        let notes: usize = commit.notes.iter().map(|(_, value)| value.len().saturating_add(256 + 4)).sum();
        let lists = commit.packs.len() * 24 + commit.tags.len() * 256;
        let manifest = match &commit.manifest {
            ManifestPlace::Inline(manifest) => manifest.encode(None).len(),
            ManifestPlace::Image(_) => 0,
        };
        [notes, lists, manifest, commit.message.len()].iter().fold(2048, |sum: usize, len| sum.saturating_add(*len))
    }

    fn check_numbers(&self) -> Result<()> {
        let seq = self.seq;
        let is_earlier = |epoch: u64| 0 < epoch && epoch < seq;
        let latest_fits = match self.body {
            Body::Commit(_) => self.latest_epoch == seq,
            Body::Create | Body::Remove | Body::Barrier { exists: false } => self.latest_epoch == 0,
            _ => self.latest_epoch < seq,
        };
        let body_fits = match &self.body {
            Body::Commit(commit) => commit.parent < seq && commit.origin.as_ref().is_none_or(|(_, epoch)| *epoch > 0),
            Body::Tag { epoch, .. } => is_earlier(*epoch),
            Body::Drop { epochs } => epochs.iter().all(|epoch| is_earlier(*epoch)) && epochs.is_sorted_by(|a, b| a < b),
            Body::Barrier { .. } => self.generation > 0,
            _ => true,
        };
        if seq == 0 || self.last_edit >= seq || !latest_fits || !body_fits {
            return invalid(WHAT, "its numbers contradict each other");
        }
        if (seq == 1) != (self.previous == [0; 32]) {
            return invalid(WHAT, "the first record follows none, and every other one follows one");
        }
        Ok(())
    }

    /// Appends the record as a block, and returns the block's length and the record's digest. It must be one that
    /// [`Record::check`] lets pass; of others, some panic here and some cannot be read back.
    ///
    /// `own` is the name under which the commit's blocks referred to the object that this record will be.
    pub fn put_block(&self, own: Option<&ObjectRef>, out: &mut Vec<u8>) -> (u32, Hash) {
        let payload = self.encode(own);
        (put_raw_block(BlockKind::Record, &payload, out), record_digest(&payload))
    }

    fn encode(&self, own: Option<&ObjectRef>) -> Vec<u8> {
        let mut out = Vec::with_capacity(512);
        out.put_u64(self.seq);
        out.put_short(self.machine.as_bytes());
        out.put_u64(self.term);
        out.put_flag(self.owner.is_some());
        if let Some(owner) = &self.owner {
            out.put(&owner.host);
            out.put_short(owner.name.as_bytes());
            out.put_u32(owner.lease_ms);
        }
        out.put(&self.writer);
        out.put_u64(self.time_ns);
        out.put(&self.previous);
        out.put_u64(self.latest_epoch);
        out.put_u64(self.last_edit);
        out.put_u8(self.kind() | if self.generation > 0 { WITH_GENERATION } else { 0 });
        if self.generation > 0 {
            out.put_u64(self.generation);
        }
        match &self.body {
            Body::Create | Body::Term | Body::Remove => {}
            Body::Commit(commit) => commit.put(own, &mut out),
            Body::Tag { epoch, name } => {
                out.put_u64(*epoch);
                out.put_short(name.as_bytes());
            }
            Body::Untag { name } => out.put_short(name.as_bytes()),
            Body::Drop { epochs } => {
                out.put_u32(u32::try_from(epochs.len()).expect("a drop names fewer than 4 billion epochs"));
                for epoch in epochs {
                    out.put_u64(*epoch);
                }
            }
            Body::Barrier { exists } => out.put_flag(*exists),
        }
        out
    }

    fn kind(&self) -> u8 {
        match &self.body {
            Body::Create => 1,
            Body::Commit(_) => 2,
            Body::Term => 3,
            Body::Tag { .. } => 4,
            Body::Untag { .. } => 5,
            Body::Drop { .. } => 6,
            Body::Remove => 7,
            Body::Barrier { .. } => 8,
        }
    }

    /// Decodes the record with this number of this machine's log from its block; returns its digest too.
    pub fn decode_block(bytes: &[u8], machine: &str, seq: u64) -> Result<(Self, Hash)> {
        let block = Block::only(bytes, BlockKind::Record)?;
        let record = Self::decode(block.payload)?;
        if record.seq != seq || &*record.machine != machine {
            return Err(FormatError::Mismatch { what: WHAT, why: "it says another machine or number" });
        }
        Ok((record, record_digest(block.payload)))
    }

    fn decode(payload: &[u8]) -> Result<Self> {
        let mut from = Reader::new(WHAT, payload);
        let seq = from.u64()?;
        let machine: Arc<str> = from.short_text()?.into();
        check_machine(&machine)?;
        let own = ObjectRef::Record { machine: machine.clone(), seq };
        let term = from.u64()?;
        let owner = if from.flag()? {
            Some(Owner { host: from.array()?, name: from.short_text()?.to_owned(), lease_ms: from.u32()? })
        } else {
            None
        };
        let writer = from.array()?;
        let time_ns = from.u64()?;
        let previous = from.array()?;
        let latest_epoch = from.u64()?;
        let last_edit = from.u64()?;
        let kind = from.u8()?;
        let generation = if kind & WITH_GENERATION == 0 { 0 } else { from.u64()? };
        if kind & WITH_GENERATION != 0 && generation == 0 {
            return invalid(WHAT, "it heeds a condemnation that has no number");
        }
        let body = match kind & !WITH_GENERATION {
            1 => Body::Create,
            2 => Body::Commit(Commit::read(&own, &mut from)?),
            3 => Body::Term,
            4 => Body::Tag { epoch: from.u64()?, name: read_tag(&mut from)? },
            5 => Body::Untag { name: read_tag(&mut from)? },
            6 => {
                let count = from.u32()? as usize;
                let mut epochs = Vec::with_capacity(from.bounded(count, 8)?);
                for _ in 0..count {
                    epochs.push(from.u64()?);
                }
                Body::Drop { epochs }
            }
            7 => Body::Remove,
            8 => Body::Barrier { exists: from.flag()? },
            _ => return invalid(WHAT, "its kind is unknown"),
        };
        from.end()?;
        let record =
            Self { machine, seq, term, owner, writer, time_ns, previous, latest_epoch, last_edit, generation, body };
        record.check_numbers()?;
        Ok(record)
    }
}

fn record_digest(payload: &[u8]) -> Hash {
    blake3::derive_key("EpochFS v1 record digest", payload)
}

fn read_tag(from: &mut Reader<'_>) -> Result<String> {
    let name = from.short_text()?;
    check_tag(name)?;
    Ok(name.to_owned())
}

impl Commit {
    fn put(&self, own: Option<&ObjectRef>, out: &mut Vec<u8>) {
        out.put_u64(self.parent);
        out.put_flag(self.origin.is_some());
        if let Some((machine, epoch)) = &self.origin {
            out.put_short(machine.as_bytes());
            out.put_u64(*epoch);
        }
        out.put(&self.digest);
        out.put_u64(self.logical_len);
        out.put_u64(self.changed_pages);
        out.put_u64(self.new_pages);
        out.put_u64(self.stored_len);
        out.put_u32(u32::try_from(self.packs.len()).expect("a commit writes fewer than 4 billion packs"));
        for (id, len) in &self.packs {
            out.put(id);
            out.put_u64(*len);
        }
        out.put_u16(u16::try_from(self.tags.len()).expect("tags are few"));
        for tag in &self.tags {
            out.put_short(tag.as_bytes());
        }
        out.put_long(self.message.as_bytes());
        out.put_u16(u16::try_from(self.notes.len()).expect("notes are few"));
        for (name, value) in &self.notes {
            out.put_short(name.as_bytes());
            out.put_long(value.as_bytes());
        }
        match &self.manifest {
            ManifestPlace::Inline(manifest) => {
                out.put_u8(0);
                out.put_long(&manifest.encode(own));
            }
            ManifestPlace::Image(image) => {
                out.put_u8(1);
                image.put(own, out);
            }
        }
    }

    fn read(own: &ObjectRef, from: &mut Reader<'_>) -> Result<Self> {
        let parent = from.u64()?;
        let origin = if from.flag()? {
            let machine = from.short_text()?;
            check_machine(machine)?;
            Some((machine.into(), from.u64()?))
        } else {
            None
        };
        let digest = from.array()?;
        let (logical_len, changed_pages, new_pages, stored_len) = (from.u64()?, from.u64()?, from.u64()?, from.u64()?);
        let count = from.u32()? as usize;
        let mut packs = Vec::with_capacity(from.bounded(count, 24)?);
        for _ in 0..count {
            packs.push((from.array()?, from.u64()?));
        }
        let count = usize::from(from.u16()?);
        let mut tags = Vec::with_capacity(from.bounded(count, 1 + 1)?);
        for _ in 0..count {
            tags.push(read_tag(from)?);
        }
        let message = from.long_text()?.to_owned();
        let count = usize::from(from.u16()?);
        let mut notes = Vec::with_capacity(from.bounded(count, 1 + 4)?);
        for _ in 0..count {
            notes.push((from.short_text()?.to_owned(), from.long_text()?.to_owned()));
        }
        let manifest = match from.u8()? {
            0 => ManifestPlace::Inline(Manifest::decode(from.long_bytes()?, Some(own))?),
            1 => ManifestPlace::Image(Image::read(Some(own), from)?),
            _ => return invalid(WHAT, "the kind of its manifest is unknown"),
        };
        Ok(Self {
            parent,
            origin,
            digest,
            logical_len,
            changed_pages,
            new_pages,
            stored_len,
            packs,
            tags,
            message,
            notes,
            manifest,
        })
    }
}
