//! Appending to a machine's log: the only way anything changes.

use std::sync::Arc;

use epochfs_format::{Body, Hash, ObjectRef, Owner, RECORDS_A_SEGMENT, Record, encode_header, record_key};

use super::log::Head;
use super::objects::Objects;
use super::packs::Inline;
use crate::error::{Error, Kind, Result};
use crate::platform::store::Put;
use crate::platform::{clock, random};

/// A record before it has a number.
pub struct Draft {
    pub term: u64,
    pub owner: Option<Owner>,
    /// The newest epoch once the record is in the log; a commit's own number is filled in.
    pub latest_epoch: u64,
    /// The newest condemnation that it heeds, if the record before it heeds none that is newer.
    pub generation: u64,
    pub body: Body,
    /// Blocks that the record carries.
    pub inline: Inline,
    /// By what the record is known again if the store does not say whether it arrived; random unless given.
    pub writer: Option<[u8; 16]>,
}

/// What to do when another record came first.
pub enum Rebase {
    /// It does not matter: append after it.
    After,
    /// It does: give up.
    Refuse(Error),
}

impl Draft {
    fn encode(&self, objects: &Objects, machine: &Arc<str>, head: Option<&Head>, writer: [u8; 16]) -> Result<Encoded> {
        let seq = head.map_or(0, |head| head.record.seq) + 1;
        let is_commit = matches!(self.body, Body::Commit(_));
        let record = Record {
            machine: machine.clone(),
            seq,
            term: self.term,
            owner: self.owner.clone(),
            writer,
            time_ns: clock::now_ns(),
            previous: head.map_or([0; 32], |head| head.digest),
            latest_epoch: if is_commit { seq } else { self.latest_epoch },
            last_edit: head
                .map_or(0, |head| if head.record.is_edit() { head.record.seq } else { head.record.last_edit }),
            generation: head.map_or(0, |head| head.record.generation).max(self.generation),
            body: self.body.clone(),
        };
        record.check().map_err(|error| Error::usage(format!("{machine}: {error}")))?;
        let mut block = Vec::new();
        let (len, digest) = record.put_block(Some(&self.inline.own), &mut block);
        let mut footer = self.inline.footer.clone();
        footer.push(epochfs_format::BlockKind::Record, [0; 32], len);
        let end = footer.finish();
        // What is about to become the truth must read back as itself.
        let (decoded, decoded_digest) =
            Record::decode_block(&block, machine, seq).expect("a record that was just encoded decodes");
        assert_eq!(digest, decoded_digest, "a record's digest is a function of its bytes");
        let header = encode_header(objects.repository(), &ObjectRef::Record { machine: machine.clone(), seq });
        Ok(Encoded { header: header.to_vec(), block, end, record: decoded, digest })
    }
}

struct Encoded {
    header: Vec<u8>,
    block: Vec<u8>,
    end: Vec<u8>,
    record: Record,
    digest: Hash,
}

/// Appends the record after `head`. Each record that others appended meanwhile is shown to `rebase`, which decides
/// whether to go on behind it, and may change the draft.
pub(super) fn append(
    objects: &Objects,
    machine: &Arc<str>,
    head: Option<Head>,
    mut draft: Draft,
    rebase: &mut dyn FnMut(&Record, &mut Draft) -> Result<Rebase>,
) -> Result<Head> {
    let appended = append_draft(objects, machine, head, &mut draft, rebase);
    draft.inline.give_back(objects);
    appended
}

fn append_draft(
    objects: &Objects,
    machine: &Arc<str>,
    mut head: Option<Head>,
    draft: &mut Draft,
    rebase: &mut dyn FnMut(&Record, &mut Draft) -> Result<Rebase>,
) -> Result<Head> {
    let writer = draft.writer.unwrap_or_else(random::id16);
    loop {
        let encoded = draft.encode(objects, machine, head.as_ref(), writer)?;
        let seq = encoded.record.seq;
        // The store makes all names of one directory durable together; the record before may be in another.
        if let Some(head) = head.as_ref().filter(|head| head.record.seq / RECORDS_A_SEGMENT != seq / RECORDS_A_SEGMENT)
        {
            objects.store().settle(&record_key(machine, head.record.seq))?;
        }
        let parts: [&[u8]; 4] = [&encoded.header, draft.inline.blocks(), &encoded.block, &encoded.end];
        let put = objects.put_until_known(&record_key(machine, seq), &parts).map_err(|error| {
            let unknown =
                format!("whether record {seq} of {machine} was written is not known; `epochfs log {machine}` tells");
            match error.next_step().map(str::to_owned) {
                None => error.hint(unknown),
                Some(first) if error.kind() == Kind::Unavailable => error.hint(format!("{first}; {unknown}")),
                Some(_) => error,
            }
        })?;
        if put == Put::Created {
            return Ok(Head { record: encoded.record, digest: encoded.digest });
        }
        let Some((record, digest)) = objects.record(machine, seq)? else {
            return Err(Error::damaged(format!("record {seq} of {machine} exists and cannot be read")));
        };
        // A store that retries by itself may answer that the name is taken by our own first try.
        if record.writer == writer {
            return Ok(Head { record, digest });
        }
        match rebase(&record, draft)? {
            Rebase::After => head = Some(Head { record, digest }),
            Rebase::Refuse(error) => return Err(error),
        }
    }
}
