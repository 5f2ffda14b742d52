//! What is said over the control socket: a request a line, answered by a line. Before the answer to a request that asks for
//! it there may be lines of news.
//!
//! ```text
//! {"version":1,"request":"commit","machine":"web1","message":"","tags":["a"],"notes":[]}
//! {"version":1,"answer":{...}}    or    {"version":1,"error":{"kind":"conflict","message":"...","next_step":null}}
//! {"version":1,"news":{"frozen_ms":0.03}}
//! ```

use std::io::{BufRead, Read};

use epochfs_format::{ObjectRef, check_machine, hex, parse_id};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::epoch::{Committed, commit_of};
use crate::error::{Error, Kind, Result};
use crate::fs;
use crate::ha::ProtectionStatus;
use crate::ops::kernel::KernelSetting;
use crate::platform::lease::LeaseClaim;

/// Rises when an older peer would misunderstand a request or an answer. New fields do not raise it.
const VERSION: u64 = 1;

/// The longest line that is read.
pub const LINE_LEN_MAX: usize = 4 << 20;

/// What a client may ask.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
#[serde(tag = "request", rename_all = "snake_case")]
pub enum Request {
    /// Who is there? Answered with an [`Introduction`].
    Ping,
    /// Answered with a [`DaemonStatus`].
    Status,
    /// Commits a machine's live. Answered with a [`CommitSummary`] when the epoch is durable.
    Commit(CommitRequest),
    /// Said behind a commit that waits for it, after the news that everything is frozen: whether the machine stood still until then.
    /// An epoch is made only of one that did.
    StoodStill { did: bool },
    /// Commits not live but the newest epoch once more, with what lies in some objects stored again. Answered with a
    /// [`CommitSummary`].
    StoreAgain(StoreAgainRequest),
    /// How far the prefetch of an epoch's stream is, which must be open; or has everything of it pushed. Answered with a
    /// [`PrefetchStatus`](crate::restore::PrefetchStatus).
    Prefetch(PrefetchRequest),
    /// Which pages of an epoch's stream a restore will need. Answered with
    /// [`Foreseen`](crate::restore::Foreseen), whose runs are bounded.
    Forecast(ForecastRequest),
    /// A machine was removed from the repository: what is kept of it here is given up. Answered with whether it is gone.
    Forget { machine: String },
    /// How the protection of a machine is, for `status`. Answered with nothing.
    Protection(Box<ProtectionStatus>),
    /// Under what a machine that this host owns may run. Answered with a [`LeaseGrant`].
    Lease { machine: String },
    /// Takes a machine over in which this term is in force, and grants it a lease. Answered with a [`LeaseGrant`].
    TakeOver { machine: String, term: u64 },
    /// Whether machines of hosts that failed are started here, by whoever says this, and of which machines he keeps how many
    /// bytes at hand. Answered with nothing.
    Accepting {
        is_accepting: bool,
        #[serde(default)]
        warm: Vec<(String, u64)>,
    },
    /// Unmounts. Answered with [`Unmounted`] when the daemon has finished its work; where the unmount is lazy and
    /// files are still open, when no path leads to the mount any more.
    Umount { lazy: bool },
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct CommitRequest {
    pub machine: String,
    #[serde(default)]
    pub message: String,
    #[serde(default)]
    pub tags: Vec<String>,
    #[serde(default)]
    pub notes: Vec<(String, String)>,
    /// Whether there is to be news of the moment in which everything was frozen: what is written from then on belongs
    /// to the next epoch.
    #[serde(default)]
    pub tells_frozen: bool,
    /// Whether who asks has brought everything to one moment, as an agent does.
    #[serde(default)]
    pub is_capture: bool,
    /// Until when everything stands still, by the clock that runs since this host was started.
    #[serde(default)]
    pub frozen_by_ms: Option<u64>,
    /// Whether it is said afterwards that everything stood still, with [`Request::StoodStill`]. A capture that nobody confirms
    /// becomes no epoch.
    #[serde(default)]
    pub confirms: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct StoreAgainRequest {
    pub machine: String,
    #[serde(default)]
    pub message: String,
    /// The zstd level; the mount's where none is given.
    #[serde(default)]
    pub level: Option<i32>,
    pub moves: Vec<ObjectName>,
}

/// An object of the repository.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum ObjectName {
    Pack(String),
    Record(String, u64),
}

impl From<&ObjectRef> for ObjectName {
    fn from(object: &ObjectRef) -> Self {
        match object {
            ObjectRef::Pack(id) => Self::Pack(hex(id)),
            ObjectRef::Record { machine, seq } => Self::Record(machine.to_string(), *seq),
        }
    }
}

impl ObjectName {
    pub fn parse(&self) -> Result<ObjectRef> {
        match self {
            Self::Pack(id) => {
                parse_id(id).map(ObjectRef::Pack).ok_or_else(|| Error::usage(format!("{id:?} is the name of no pack")))
            }
            Self::Record(machine, seq) => {
                check_machine(machine).map_err(|error| Error::usage(format!("{machine:?}: {error}")))?;
                Ok(ObjectRef::Record { machine: machine.as_str().into(), seq: *seq })
            }
        }
    }
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct PrefetchRequest {
    pub machine: String,
    pub epoch: u64,
    pub stream: String,
    #[serde(default)]
    pub everything: bool,
}

#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ForecastRequest {
    pub machine: String,
    pub epoch: u64,
    pub stream: String,
}

/// Who the daemon is.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Introduction {
    pub repository: String,
    pub id: String,
    pub mountpoint: String,
    pub pid: u32,
    /// The program's version.
    pub epochfs: String,
    /// `mounted`, `stopping`, or `detached`: not to be reached by a path any more, while files are still open.
    pub state: String,
}

/// Under what a machine may run on a host.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct LeaseGrant {
    /// The term in which it runs; 0 where the host has no leases.
    pub term: u64,
    /// What must be heeded all the while; nothing where the host has no leases.
    pub claim: Option<LeaseClaim>,
}

/// What a commit made.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct CommitSummary {
    pub machine: String,
    pub epoch: u64,
    pub parent: u64,
    pub digest: String,
    pub read_bytes: u64,
    pub changed_pages: u64,
    pub new_pages: u64,
    pub deduplicated_pages: u64,
    pub stored_bytes: u64,
    pub index_lookups: u64,
    pub index_hits: u64,
    pub elapsed_ms: f64,
    /// Bytes that commits may still take in the store, where it has an end.
    #[serde(default)]
    pub room_bytes: Option<u64>,
}

impl CommitSummary {
    /// `index` are the look-ups and the hits.
    pub fn new(
        committed: &Committed,
        index: (u64, u64),
        elapsed: std::time::Duration,
        room_bytes: Option<u64>,
    ) -> Result<Self> {
        let (commit, counts) = (commit_of(&committed.record)?, &committed.counts);
        Ok(Self {
            machine: committed.machine.to_string(),
            epoch: committed.epoch,
            parent: commit.parent,
            digest: epochfs_format::hex(&commit.digest),
            read_bytes: counts.read_bytes,
            changed_pages: counts.changed_pages,
            new_pages: counts.new_pages,
            deduplicated_pages: counts.deduplicated_pages,
            stored_bytes: committed.stored_bytes,
            index_lookups: index.0,
            index_hits: index.1,
            elapsed_ms: elapsed.as_secs_f64() * 1000.0,
            room_bytes,
        })
    }
}

/// A running daemon.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct DaemonStatus {
    #[serde(flatten)]
    pub who: Introduction,
    pub started_ns: u64,
    pub read_only: bool,
    pub allow_other: bool,
    pub threads: usize,
    pub spool_bytes_max: u64,
    pub socket: String,
    /// Where a daemon in the background writes what happens.
    pub log: Option<String>,
    /// Whether the kernel knows that this process writes its dirty pages back, and lets it allocate accordingly.
    pub io_flusher: bool,
    pub kernel: Vec<KernelSetting>,
    /// The machines that agents protect, as they said last.
    #[serde(default)]
    pub protected: Vec<Protected>,
    #[serde(flatten)]
    pub filesystem: fs::Status,
}

/// What an agent said of a machine.
#[derive(Clone, Debug, PartialEq, Serialize, Deserialize)]
pub struct Protected {
    #[serde(flatten)]
    pub status: ProtectionStatus,
    /// How long ago it said so. Agents speak every second.
    pub said_ms_ago: f64,
}

/// How an unmount went.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub struct Unmounted {
    pub mountpoint: String,
    /// Whether the daemon has ended. If not, it serves the files that are still open until they are closed.
    pub ended: bool,
    /// Who holds files open, for people.
    pub holders: Vec<String>,
    /// The machines with changes that no epoch holds. They are kept on this host, where its next mount has them.
    #[serde(default)]
    pub uncommitted: Vec<String>,
}

/// One line from a peer, without its end; `None` when there is none any more.
pub fn read_line(reader: &mut impl BufRead) -> Result<Option<Vec<u8>>> {
    let mut line = Vec::new();
    reader
        .take(LINE_LEN_MAX as u64 + 1)
        .read_until(b'\n', &mut line)
        .map_err(|error| Error::io("the control socket", error))?;
    match line.pop() {
        None => Ok(None),
        Some(b'\n') => Ok(Some(line)),
        Some(_) if line.len() >= LINE_LEN_MAX => {
            Err(Error::usage(format!("a message on the control socket is longer than {LINE_LEN_MAX} bytes")))
        }
        Some(_) => Err(Error::new(Kind::Io, "a message on the control socket broke off")),
    }
}

fn line(mut document: Value) -> Vec<u8> {
    document["version"] = json!(VERSION);
    let mut line = document.to_string().into_bytes();
    line.push(b'\n');
    line
}

/// A document of this version.
fn parse(line: &[u8]) -> Result<Value> {
    let document: Value = serde_json::from_slice(line)
        .map_err(|error| Error::usage(format!("what came over the control socket is no document: {error}")))?;
    match document["version"].as_u64() {
        Some(VERSION) => Ok(document),
        Some(version) => Err(Error::new(
            Kind::Unsupported,
            format!("the other side of the control socket speaks version {version} of the protocol, not {VERSION}"),
        )
        .hint("unmount, and mount again with the program that is installed now")),
        None => Err(Error::usage("what came over the control socket has no version")),
    }
}

impl Request {
    pub fn encode(&self) -> Result<Vec<u8>> {
        let document = serde_json::to_value(self).map_err(|error| Error::usage(format!("the request: {error}")))?;
        let line = line(document);
        if line.len() > LINE_LEN_MAX {
            return Err(Error::usage(format!(
                "a commit takes at most {LINE_LEN_MAX} bytes of message, tags and notes"
            )));
        }
        Ok(line)
    }

    pub fn decode(line: &[u8]) -> Result<Self> {
        serde_json::from_value(parse(line)?)
            .map_err(|error| Error::usage(format!("the daemon does not know this request: {error}")))
    }
}

/// An answer, or the error there was instead, as a line.
pub fn encode_answer(answer: Result<Value>) -> Vec<u8> {
    let encoded = line(match answer {
        Ok(answer) => json!({"answer": answer}),
        Err(error) => json!({"error": {
            "kind": error.kind().name(),
            "message": error.to_string(),
            "next_step": error.next_step(),
        }}),
    });
    if encoded.len() <= LINE_LEN_MAX {
        return encoded;
    }
    encode_answer(Err(Error::new(Kind::Unsupported, "the answer is too long for the control socket")))
}

/// News before the answer, as a line.
pub fn encode_news(news: Value) -> Vec<u8> {
    line(json!({"news": news}))
}

/// What a line has for news, if it is no answer.
pub fn decode_news(line: &[u8]) -> Result<Option<Value>> {
    let mut document = parse(line)?;
    Ok(document.get_mut("news").map(Value::take))
}

/// What a line answers, or the error that it is.
pub fn decode_answer<T: DeserializeOwned>(line: &[u8]) -> Result<T> {
    let mut document = parse(line)?;
    if let Some(error) = decode_error(&document) {
        return Err(error);
    }
    serde_json::from_value(document["answer"].take())
        .map_err(|error| Error::new(Kind::Unsupported, format!("the daemon's answer is not understood: {error}")))
}

/// The error that a document tells of.
pub fn decode_error(document: &Value) -> Option<Error> {
    let error = document.get("error")?;
    let kind = error["kind"].as_str().and_then(Kind::from_name).unwrap_or(Kind::Io);
    let decoded = Error::new(kind, error["message"].as_str().unwrap_or("an error without a message"));
    Some(match error["next_step"].as_str() {
        Some(next) => decoded.hint(next),
        None => decoded,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_survive_the_journey() {
        let commit = CommitRequest {
            machine: "web1".into(),
            message: "two\nlines".into(),
            tags: vec!["a".into()],
            notes: vec![("b".into(), "c".into())],
            tells_frozen: true,
            is_capture: true,
            frozen_by_ms: Some(7),
            confirms: true,
        };
        let stood_still = Request::StoodStill { did: true };
        for request in [Request::Ping, Request::Commit(commit), stood_still, Request::Umount { lazy: true }] {
            let line = request.encode().unwrap();
            assert_eq!(line.iter().filter(|byte| **byte == b'\n').count(), 1);
            assert_eq!(Request::decode(&line).unwrap(), request);
        }
        let short = br#"{"version":1,"request":"commit","machine":"web1","unknown":1}"#;
        let expected = CommitRequest { machine: "web1".into(), ..Default::default() };
        assert_eq!(Request::decode(short).unwrap(), Request::Commit(expected));
    }

    #[test]
    fn errors_arrive_as_they_were() {
        for kind in [Kind::Usage, Kind::NotFound, Kind::Conflict, Kind::Fenced, Kind::Damaged, Kind::NoSpace, Kind::Io]
        {
            let line = encode_answer(Err(Error::new(kind, "what happened").hint("what to do")));
            let error = decode_answer::<Value>(&line).unwrap_err();
            assert_eq!((error.kind(), error.to_string().as_str()), (kind, "what happened"));
            assert_eq!(error.next_step(), Some("what to do"));
        }
        let line = encode_answer(Err(Error::conflict("no advice")));
        assert_eq!(decode_answer::<Value>(&line).unwrap_err().next_step(), None);
    }

    #[test]
    fn what_is_not_understood_is_refused() {
        for (line, kind) in [
            (&b""[..], Kind::Usage),
            (b"[]", Kind::Usage),
            (b"{}", Kind::Usage),
            (b"{\"version\":1}", Kind::Usage),
            (b"{\"version\":1,\"request\":\"commit\"}", Kind::Usage),
            (b"{\"version\":1,\"request\":\"no such thing\"}", Kind::Usage),
            (b"{\"version\":2,\"request\":\"ping\"}", Kind::Unsupported),
            (b"\xff", Kind::Usage),
        ] {
            assert_eq!(Request::decode(line).unwrap_err().kind(), kind, "{line:?}");
        }
    }

    #[test]
    fn lines_are_bounded() {
        let read = |bytes: &[u8]| read_line(&mut &*bytes);
        assert_eq!(read(b"a\nb\n").unwrap().unwrap(), b"a");
        assert_eq!(read(b"").unwrap(), None);
        assert!(read(b"a").is_err());
        let mut long = vec![b'a'; LINE_LEN_MAX + 1];
        assert_eq!(read(&long).unwrap_err().kind(), Kind::Usage);
        long[LINE_LEN_MAX] = b'\n';
        assert_eq!(read(&long).unwrap().unwrap().len(), LINE_LEN_MAX);
        let big = CommitRequest { message: "a".repeat(LINE_LEN_MAX), ..Default::default() };
        assert_eq!(Request::Commit(big).encode().unwrap_err().kind(), Kind::Usage);
        let line = encode_answer(Ok(json!("a".repeat(LINE_LEN_MAX))));
        assert_eq!(decode_answer::<Value>(&line).unwrap_err().kind(), Kind::Unsupported);
    }
}
