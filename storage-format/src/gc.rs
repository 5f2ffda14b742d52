//! What the garbage collector and those whom it has to heed tell each other: the collector's log, and readers' leases.

use std::sync::Arc;

use crate::error::{FormatError, Result, invalid};
use crate::name::check_machine;
use crate::reference::ObjectRef;
use crate::wire::{Put, Reader, head, open, sealed};

const RECORD_MAGIC: [u8; 8] = *b"EPOCHGCR";
const LEASE_MAGIC: [u8; 8] = *b"EPOCHLSE";
const BIRTH_MAGIC: [u8; 8] = *b"EPOCHBTH";

/// The most objects that one record condemns: what is left is condemned by the next.
pub const CONDEMNED_MAX: usize = 1 << 17;

/// The most epochs that one lease names.
pub const HELD_MAX: usize = 1 << 16;

/// A numbered fact of the collector's log. Creating the next one decides between collectors.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GcRecord {
    pub repository: [u8; 16],
    pub seq: u64,
    /// Random, unique for this attempt to write the record.
    pub writer: [u8; 16],
    /// When, by the writer's clock. For people only.
    pub time_ns: u64,
    pub body: GcBody,
}

/// The steps of a collection, in this order.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum GcBody {
    /// No commit refers to these objects from here on, other than by what its machine's log had before.
    Condemn { objects: Vec<ObjectRef> },
    /// Every log has a barrier with the number of the condemnation.
    Fence { condemned: u64 },
    /// What was condemned is deleted, but for these objects, which were found in use.
    Delete { condemned: u64, kept: Vec<ObjectRef> },
    /// It is gone.
    Done { condemned: u64 },
}

impl GcBody {
    /// The record's kind in a word.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Condemn { .. } => "condemn",
            Self::Fence { .. } => "fence",
            Self::Delete { .. } => "delete",
            Self::Done { .. } => "done",
        }
    }
}

impl GcRecord {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = head(RECORD_MAGIC, &self.repository);
        out.put_u64(self.seq);
        out.put(&self.writer);
        out.put_u64(self.time_ns);
        match &self.body {
            GcBody::Condemn { objects } => {
                out.put_u8(1);
                put_objects(objects, &mut out);
            }
            GcBody::Fence { condemned } => {
                out.put_u8(2);
                out.put_u64(*condemned);
            }
            GcBody::Delete { condemned, kept } => {
                out.put_u8(3);
                out.put_u64(*condemned);
                put_objects(kept, &mut out);
            }
            GcBody::Done { condemned } => {
                out.put_u8(4);
                out.put_u64(*condemned);
            }
        }
        sealed(out)
    }

    /// Decodes the record with this number of this repository's log.
    pub fn decode(bytes: &[u8], repository: &[u8; 16], seq: u64) -> Result<Self> {
        const WHAT: &str = "collector's record";
        let mut from = open(WHAT, RECORD_MAGIC, bytes, repository)?;
        if from.u64()? != seq || seq == 0 {
            return Err(FormatError::Mismatch { what: WHAT, why: "it says another number" });
        }
        let (writer, time_ns) = (from.array()?, from.u64()?);
        let body = match from.u8()? {
            1 => GcBody::Condemn { objects: read_objects(WHAT, &mut from)? },
            2 => GcBody::Fence { condemned: from.u64()? },
            3 => GcBody::Delete { condemned: from.u64()?, kept: read_objects(WHAT, &mut from)? },
            4 => GcBody::Done { condemned: from.u64()? },
            _ => return invalid(WHAT, "its kind is unknown"),
        };
        from.end()?;
        // The steps follow each other without another between them.
        let fits = match &body {
            GcBody::Condemn { .. } => seq % 4 == 1,
            GcBody::Fence { condemned } => seq % 4 == 2 && condemned.checked_add(1) == Some(seq),
            GcBody::Delete { condemned, .. } => seq % 4 == 3 && condemned.checked_add(2) == Some(seq),
            GcBody::Done { condemned } => seq.is_multiple_of(4) && condemned.checked_add(3) == Some(seq),
        };
        if !fits {
            return invalid(WHAT, "it is a step that is not due at its number");
        }
        Ok(Self { repository: *repository, seq, writer, time_ns, body })
    }
}

/// What a reader says of itself, again and again under rising numbers for as long as it lives.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Lease {
    pub repository: [u8; 16],
    pub reader: [u8; 16],
    pub number: u64,
    /// The newest record of the collector's log behind which every epoch was found that is read and not named here.
    pub heeded: u64,
    /// For how long it counts without a further one, by the clock of whoever watches it.
    pub lease_ms: u32,
    /// Whose it is, for people.
    pub host: String,
    /// The epochs being read.
    pub held: Vec<(Arc<str>, u64)>,
}

impl Lease {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = head(LEASE_MAGIC, &self.repository);
        out.put(&self.reader);
        out.put_u64(self.number);
        out.put_u64(self.heeded);
        out.put_u32(self.lease_ms);
        let end = (0..=self.host.len().min(255)).rfind(|end| self.host.is_char_boundary(*end));
        out.put_short(&self.host.as_bytes()[..end.unwrap_or(0)]);
        out.put_u32(u32::try_from(self.held.len()).expect("a lease names at most 65,536 epochs"));
        for (machine, epoch) in &self.held {
            out.put_short(machine.as_bytes());
            out.put_u64(*epoch);
        }
        sealed(out)
    }

    pub fn decode(bytes: &[u8], repository: &[u8; 16]) -> Result<Self> {
        const WHAT: &str = "lease";
        let mut from = open(WHAT, LEASE_MAGIC, bytes, repository)?;
        let (reader, number, heeded, lease_ms) = (from.array()?, from.u64()?, from.u64()?, from.u32()?);
        let host = from.short_text()?.to_owned();
        let count = from.u32()? as usize;
        if count > HELD_MAX {
            return invalid(WHAT, "it names too many epochs");
        }
        let mut held = Vec::with_capacity(from.bounded(count, 1 + 8)?);
        for _ in 0..count {
            let machine = from.short_text()?;
            check_machine(machine)?;
            held.push((machine.into(), from.u64()?));
        }
        from.end()?;
        Ok(Self { repository: *repository, reader, number, heeded, lease_ms, host, held })
    }
}

/// A commit on its way to a machine that has no log yet, in which a barrier could be put.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Birth {
    pub repository: [u8; 16],
    pub machine: Arc<str>,
}

impl Birth {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = head(BIRTH_MAGIC, &self.repository);
        out.put_short(self.machine.as_bytes());
        sealed(out)
    }

    pub fn decode(bytes: &[u8], repository: &[u8; 16]) -> Result<Self> {
        let mut from = open("announcement", BIRTH_MAGIC, bytes, repository)?;
        let machine = from.short_text()?;
        check_machine(machine)?;
        from.end()?;
        Ok(Self { repository: *repository, machine: machine.into() })
    }
}

fn put_objects(objects: &[ObjectRef], out: &mut Vec<u8>) {
    out.put_u32(u32::try_from(objects.len()).expect("a record names at most 131,072 objects"));
    objects.iter().for_each(|object| object.put(None, out));
}

/// In rising order, each once.
fn read_objects(what: &'static str, from: &mut Reader<'_>) -> Result<Vec<ObjectRef>> {
    let count = from.u32()? as usize;
    if count > CONDEMNED_MAX {
        return invalid(what, "it names too many objects");
    }
    let mut objects = Vec::with_capacity(from.bounded(count, 1 + 10)?);
    for _ in 0..count {
        objects.push(ObjectRef::read(None, from)?);
    }
    if !objects.is_sorted_by(|a, b| a < b) {
        return invalid(what, "its objects are not in order");
    }
    Ok(objects)
}
