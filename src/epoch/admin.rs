//! Everything else that is appended to a log: creating, cloning, tagging, dropping, removing, owning.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use epochfs_format::{
    Body, Commit, ManifestPlace, Owner, Record, check_machine, check_tag, machine_traces_prefix, record_key,
};

use super::view::{EpochStore, commit_of};
use crate::error::{Error, Kind, Result};
use crate::platform::clock::{BootClock, Clock};
use crate::platform::random;
use crate::platform::store::keys_below;
use crate::repo::{Birth, Draft, FIRST_TERM, Head, Inline, Rebase};

/// What a machine's owner holds. Every record it appends names this term; a later term ends it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Ownership {
    pub machine: Arc<str>,
    pub term: u64,
    /// Before the term was asked for, in this host's time since it was started.
    pub since: Duration,
}

/// A try to take a machine over. Made again as the same one, it knows what it put before.
pub struct TermTry {
    /// The term that is to end.
    over: u64,
    writer: [u8; 16],
    since: Duration,
}

impl TermTry {
    pub fn new(over: u64) -> Self {
        Self { over, writer: random::id16(), since: BootClock.elapsed() }
    }

    pub fn is_over(&self, term: u64) -> bool {
        self.over == term
    }
}

/// So many records are gone back over for the one that began a term.
const TERM_LOOK_MAX: u32 = 64;

fn draft(record: Option<&Record>, body: Body) -> Draft {
    Draft {
        term: record.map_or(FIRST_TERM, |record| record.term),
        owner: record.and_then(|record| record.owner.clone()),
        latest_epoch: record.map_or(0, |record| record.latest_epoch),
        generation: 0,
        body,
        inline: Inline::empty(),
        writer: None,
    }
}

fn owned_by(machine: &str, owner: &Owner) -> Error {
    Error::conflict(format!("{machine} is owned by host {}", owner.name))
        .hint("a host owns what was changed on its mount: remove it with --force if nothing there is wanted")
}

/// Lets a record go behind any other that leaves the machine in being, with the state that one left.
fn behind_any(record: &Record, draft: &mut Draft) -> Rebase {
    if record.body == Body::Remove {
        return Rebase::Refuse(Error::not_found(format!("{} was removed meanwhile", record.machine)));
    }
    draft.term = record.term;
    draft.owner.clone_from(&record.owner);
    draft.latest_epoch = record.latest_epoch;
    Rebase::After
}

impl EpochStore {
    /// Makes a machine without an epoch.
    pub fn create_machine(&self, name: &str) -> Result<Head> {
        let machine: Arc<str> = name.into();
        let taken = || Error::conflict(format!("the machine {machine} exists already"));
        let head = self.repository().log_head(&machine)?;
        if head.as_ref().is_some_and(|head| head.record.machine_exists()) {
            return Err(taken());
        }
        let term = head.as_ref().map_or(FIRST_TERM, |head| head.record.term);
        let draft = Draft { term, ..draft(None, Body::Create) };
        self.repository().append(&machine, head, draft, &mut |record, _| {
            Ok(if record.machine_exists() { Rebase::Refuse(taken()) } else { Rebase::After })
        })
    }

    /// Makes a new machine whose first epoch is an epoch of another: nothing is copied.
    pub fn clone_epoch(&self, from: &Record, to: &str) -> Result<Head> {
        check_machine(to).map_err(|error| Error::usage(format!("{to:?}: {error}")))?;
        let machine: Arc<str> = to.into();
        let taken = || {
            Error::conflict(format!("the machine {machine} exists already"))
                .hint("clone to another name; a machine in use is never replaced")
        };
        let head = self.repository().log_head(&machine)?;
        if head.as_ref().is_some_and(|head| head.record.machine_exists()) {
            return Err(taken());
        }
        // Without a log there is nothing to put a barrier in: the collector is told, and then asked.
        let mut birth =
            head.is_none().then(|| self.repository().collector_log().announce_birth(&machine)).transpose()?;
        let generation = match &head {
            Some(head) => head.record.generation,
            None => self.repository().collector_log().heed_newest()?,
        };
        self.require_safe(from, generation)?;
        let source = commit_of(from)?;
        self.repository().objects().store().settle(&record_key(&from.machine, from.seq))?;
        // The manifest refers to the blocks of the source's record by that record's name, here as there.
        let manifest: ManifestPlace = source.manifest.clone();
        let commit = Commit {
            parent: 0,
            origin: Some((from.machine.clone(), from.seq)),
            digest: source.digest,
            logical_len: source.logical_len,
            changed_pages: 0,
            new_pages: 0,
            stored_len: 0,
            packs: Vec::new(),
            tags: Vec::new(),
            message: String::new(),
            notes: source.notes.clone(),
            manifest,
        };
        let term = head.as_ref().map_or(FIRST_TERM, |head| head.record.term);
        let draft = Draft { term, generation, ..draft(None, Body::Commit(commit)) };
        let mut heeded = generation;
        birth.iter_mut().for_each(Birth::set_out);
        let cloned = self.repository().append(&machine, head, draft, &mut |record, _| {
            if record.machine_exists() {
                return Ok(Rebase::Refuse(taken()));
            }
            if record.generation > heeded {
                self.require_safe(from, record.generation)?;
                heeded = record.generation;
            }
            Ok(Rebase::After)
        })?;
        birth.into_iter().for_each(Birth::arrived);
        Ok(cloned)
    }

    /// Makes sure that no condemnation up to this generation takes away what an epoch refers to: the epoch exists behind
    /// its own log's barrier.
    fn require_safe(&self, epoch: &Record, generation: u64) -> Result<()> {
        if self.repository().require(&epoch.machine)?.record.generation < generation {
            self.repository().put_barrier(&epoch.machine, generation)?;
        }
        self.repository().epoch_record(&epoch.machine, epoch.seq).map(|_| ())
    }

    /// Names an epoch. A tag that names another epoch moves only if `move_it` says so.
    pub fn tag(&self, machine: &Arc<str>, epoch: u64, name: &str, move_it: bool) -> Result<Head> {
        check_tag(name).map_err(|error| Error::usage(format!("{name:?}: {error}")))?;
        let head = self.repository().require(machine)?;
        // Looked for after the head was read: one that is dropped from here on is dropped by a record behind the head.
        self.repository().epoch_record(machine, epoch)?;
        if !move_it {
            match self.repository().tagged_record(machine, name) {
                Ok(record) if record.seq == epoch => return Ok(head),
                Ok(record) => {
                    return Err(Error::conflict(format!("{name} names epoch {} of {machine}", record.seq))
                        .hint("move it with --force, or choose another name"));
                }
                Err(error) if error.kind() == Kind::NotFound => {}
                Err(error) => return Err(error),
            }
        }
        let body = Body::Tag { epoch, name: name.to_owned() };
        let draft = draft(Some(&head.record), body);
        self.repository().append(machine, Some(head), draft, &mut |record, draft| {
            if let Body::Drop { epochs } = &record.body
                && epochs.contains(&epoch)
            {
                return Ok(Rebase::Refuse(Error::not_found(format!(
                    "epoch {epoch} of {machine} was dropped meanwhile"
                ))));
            }
            let names_another = match &record.body {
                Body::Tag { epoch: other, name: taken } => taken == name && *other != epoch,
                Body::Commit(commit) => commit.tags.iter().any(|taken| taken == name),
                _ => false,
            };
            if names_another && !move_it {
                return Ok(Rebase::Refuse(Error::conflict(format!(
                    "{name} was given to another epoch of {machine} meanwhile"
                ))));
            }
            Ok(behind_any(record, draft))
        })
    }

    /// Forgets a tag.
    pub fn untag(&self, machine: &Arc<str>, name: &str) -> Result<Head> {
        self.repository().tagged_record(machine, name)?;
        let head = self.repository().require(machine)?;
        let draft = draft(Some(&head.record), Body::Untag { name: name.to_owned() });
        self.repository().append(machine, Some(head), draft, &mut |record, draft| Ok(behind_any(record, draft)))
    }

    /// Drops epochs. Their bytes stay until they are collected.
    pub fn drop_epochs(&self, machine: &Arc<str>, epochs: &BTreeSet<u64>) -> Result<Head> {
        self.repository().with_reserve(&mut || self.drop_once(machine, epochs))
    }

    fn drop_once(&self, machine: &Arc<str>, epochs: &BTreeSet<u64>) -> Result<Head> {
        loop {
            let head = self.repository().require(machine)?;
            let list = self.repository().epochs(&head)?;
            for epoch in epochs {
                if !list.epochs.contains(*epoch) {
                    return Err(Error::not_found(format!("{machine} has no epoch {epoch}"))
                        .hint(format!("`epochfs log {machine}` lists its epochs")));
                }
            }
            let latest = list.epochs.iter().rev().find(|epoch| !epochs.contains(epoch)).unwrap_or(0);
            let body = Body::Drop { epochs: epochs.iter().copied().collect() };
            let draft = Draft { latest_epoch: latest, ..draft(Some(&head.record), body) };
            // What is the newest epoch afterwards depends on every record before: whoever came first, begin again.
            let mut lost = false;
            let appended = self.repository().append(machine, Some(head), draft, &mut |_, _| {
                lost = true;
                Ok(Rebase::Refuse(Error::conflict("another record came first")))
            });
            match appended {
                Err(_) if lost => {}
                result => return result,
            }
        }
    }

    /// Removes a machine with all its epochs. An owned one only if `forced`.
    pub fn remove_machine(&self, machine: &Arc<str>, forced: bool) -> Result<Head> {
        self.repository().with_reserve(&mut || self.remove_once(machine, forced))
    }

    fn remove_once(&self, machine: &Arc<str>, forced: bool) -> Result<Head> {
        let head = self.repository().require(machine)?;
        if let (Some(owner), false) = (&head.record.owner, forced) {
            return Err(owned_by(machine, owner));
        }
        // The term rises, so that an owner that is still there learns that it is fenced.
        let term = head.record.term + 1;
        let draft = Draft { term, owner: None, latest_epoch: 0, ..draft(Some(&head.record), Body::Remove) };
        let removed = self.repository().append(machine, Some(head), draft, &mut |record, draft| {
            if let (Some(owner), false) = (&record.owner, forced) {
                return Ok(Rebase::Refuse(owned_by(machine, owner)));
            }
            let rebase = behind_any(record, draft);
            draft.term = record.term + 1;
            draft.owner = None;
            draft.latest_epoch = 0;
            Ok(rebase)
        })?;
        // A namesake restores other pages. What is left of them by a failure is a hint, and no more.
        if let Err(error) = self.delete_traces(machine) {
            tracing::info!(%machine, "its traces stay: {error}");
        }
        Ok(removed)
    }

    fn delete_traces(&self, machine: &str) -> Result<()> {
        let store = self.repository().objects().store();
        keys_below(&**store, &machine_traces_prefix(machine))?.iter().try_for_each(|key| store.delete(key))
    }

    /// Becomes the machine's owner: begins a new term. Another owner's term is ended only if `take_over` says so.
    pub fn own(&self, machine: &Arc<str>, owner: Owner, take_over: bool) -> Result<Ownership> {
        let since = BootClock.elapsed();
        let head = self.repository().require(machine)?;
        if let (Some(other), false) = (&head.record.owner, take_over)
            && other.host != owner.host
        {
            return Err(Error::conflict(format!("{machine} is owned by host {}", other.name))
                .hint("take it over only if that host is certainly dead: it can then never commit again"));
        }
        self.begin_term(machine, head, owner, since, None)
    }

    /// Takes a machine over in which this term is in force, whoever owns it. Whatever was found out about the owner was so
    /// after the term had begun: another one that began meanwhile, also of the same owner, is left alone.
    pub fn take_over(&self, machine: &Arc<str>, owner: Owner, term: u64) -> Result<Ownership> {
        self.take_over_by(machine, owner, &TermTry::new(term))
    }

    /// The same, by a try that may have been made before: what it put then may have arrived although nobody could tell.
    pub fn take_over_by(&self, machine: &Arc<str>, owner: Owner, by: &TermTry) -> Result<Ownership> {
        let (head, term) = (self.repository().require(machine)?, by.over);
        if let Some(arrived) = self.arrived(&head, by)? {
            return Ok(arrived);
        }
        if head.record.term != term {
            let owner = head.record.owner.as_ref().map_or("nobody".to_owned(), |owner| format!("host {}", owner.name));
            return Err(Error::conflict(format!(
                "{machine} is in term {} by now, and not in term {term}: {owner} owns it",
                head.record.term
            ))
            .hint("look again who owns it, and whether that host lives: epochfs hosts"));
        }
        self.begin_term(machine, head, owner, by.since, Some(by.writer))
    }

    /// The ownership that this try has brought, if it has: the term is in force, and the first record of it is the try's.
    pub fn arrived_by(&self, machine: &Arc<str>, by: &TermTry) -> Result<Option<Ownership>> {
        self.arrived(&self.repository().require(machine)?, by)
    }

    fn arrived(&self, head: &Head, by: &TermTry) -> Result<Option<Ownership>> {
        let (machine, term) = (&head.record.machine, by.over + 1);
        let mut record = head.record.clone();
        if record.owner.is_none() {
            return Ok(None);
        }
        // Few records come behind it that are not its owner's.
        for _ in 0..TERM_LOOK_MAX {
            if record.term != term {
                break;
            }
            if record.writer == by.writer {
                return Ok(Some(Ownership { machine: machine.clone(), term, since: by.since }));
            }
            match self.repository().objects().record(machine, record.seq.saturating_sub(1))? {
                Some((before, _)) => record = before,
                None => break,
            }
        }
        Ok(None)
    }

    /// Appends the record of the term behind a head, unless another term or the machine's removal comes first.
    fn begin_term(
        &self,
        machine: &Arc<str>,
        head: Head,
        owner: Owner,
        since: Duration,
        writer: Option<[u8; 16]>,
    ) -> Result<Ownership> {
        let base = head.record.term;
        let term = base + 1;
        let draft = Draft { term, owner: Some(owner), writer, ..draft(Some(&head.record), Body::Term) };
        self.repository().append(machine, Some(head), draft, &mut |record, draft| {
            if record.term != base || record.body == Body::Remove {
                let error = Error::conflict(format!("another host became the owner of {machine} first"));
                return Ok(Rebase::Refuse(error));
            }
            draft.latest_epoch = record.latest_epoch;
            Ok(Rebase::After)
        })?;
        Ok(Ownership { machine: machine.clone(), term, since })
    }

    /// Gives a machine up: its term goes on without an owner.
    pub fn release(&self, ownership: &Ownership) -> Result<()> {
        let machine = &ownership.machine;
        let head = self.repository().require(machine)?;
        let fenced = || Error::new(Kind::Fenced, format!("{machine} was taken over: nothing is left to release"));
        if head.record.term != ownership.term {
            return Err(fenced());
        }
        let draft = Draft { owner: None, ..draft(Some(&head.record), Body::Term) };
        self.repository().append(machine, Some(head), draft, &mut |record, draft| {
            if record.term != ownership.term {
                return Ok(Rebase::Refuse(fenced()));
            }
            draft.latest_epoch = record.latest_epoch;
            Ok(Rebase::After)
        })?;
        Ok(())
    }
}
