//! The format of EpochFS: how pages, trees, manifests and log records become bytes and come back.
//!
//! Pure: no I/O, no clock, no threads, and no panic on any input. `FORMAT.md` beside this crate has the byte tables.

mod block;
mod descriptor;
mod error;
mod gc;
mod host;
mod journal;
mod manifest;
mod name;
mod node;
mod object;
mod page;
mod quarantine;
mod record;
mod reference;
mod seal;
mod summary;
mod trace;
mod wire;

pub use block::{BLOCK_HEADER_LEN, BLOCK_PAYLOAD_LEN_MAX, Block, BlockKind, PageDecoder, PageEncoder, put_raw_block};
pub use descriptor::Descriptor;
pub use error::{FormatError, Result};
pub use gc::{Birth, CONDEMNED_MAX, GcBody, GcRecord, HELD_MAX, Lease};
pub use host::{HOST_FEATURES_MAX, HOST_MACHINES_MAX, Heartbeat, HostMachine, HostOrder, HostPurpose, HostWarmth};
pub use journal::{
    JOURNAL_PAGES_MAX, JournalBase, JournalEntry, JournalKind, JournalNode, JournalReader, JournalWriter, SpooledPage,
};
pub use manifest::{Attributes, EntryKind, IMAGE_LEN_MAX, Image, Manifest, ManifestEntry, Root};
pub use name::{
    BIRTHS_PREFIX, DESCRIPTOR_KEY, GC_LOG_PREFIX, HOSTS_PREFIX, HostObject, NAME_LEN_MAX, PACKS_PREFIX,
    QUARANTINE_PREFIX, READERS_PREFIX, RECORDS_A_SEGMENT, RESERVE_KEY, STREAM_PATH_LEN_MAX, birth_key, check_machine,
    check_stream_path, check_tag, decode_component, encode_component, gc_record_key, heartbeat_key, hex,
    host_order_key, host_prefix, lease_key, log_prefix, machine_traces_prefix, pack_key, parse_host_key, parse_id,
    parse_lease_key, parse_pack_key, quarantine_key, record_key, record_seq, segment_name, summary_key, trace_prefix,
    trace_seq,
};
pub use node::{
    FANOUT, LEVELS_MAX, Node, NodeEditor, NodePatch, Slot, StoredNode, decode_node, level_span, levels_for,
};
pub use object::{
    FOOTER_ENTRY_LEN, Footer, FooterBuilder, FooterEntry, HEADER_LEN, PACK_BLOCKS_MAX, PACK_LEN_TARGET, TRAILER_LEN,
    Trailer, check_header, encode_header,
};
pub use page::{Hash, PAGE_SIZE, Page, hash_page, hash_pages, is_zero};
pub use quarantine::{QUARANTINED_MAX, Quarantine};
pub use record::{Body, Commit, INLINE_MANIFEST_LEN_MAX, ManifestPlace, Owner, Record};
pub use reference::{ObjectRef, Place};
pub use seal::{
    KEY_REMOVALS_PREFIX, KEYS_PREFIX, KeyRemoval, SEGMENT_LEN, SEGMENT_NONCE_LEN, SEGMENT_OVERHEAD, SEGMENT_PLAIN_LEN,
    SEGMENT_TAG_LEN, WrappedKey, is_never_sealed, key_removal_key, object_secret, objects_secret, plain_len,
    sealed_len, segment_claims, wrapped_key_key, wrapping_id, wrapping_secret,
};
pub use summary::{EpochSet, SUMMARY_STEP, Summary, summary_span};
pub use trace::{TRACE_LEN_MAX, TRACE_RUNS_MAX, TRACE_WINDOWS_MAX, Trace, TraceRun};

/// The version of the format that this crate writes, and the newest it reads.
pub const FORMAT_VERSION: u16 = 1;

/// The version that the descriptor of a sealed repository says, so that a program that cannot unseal it says so. Its
/// objects, once unsealed, are of the version above.
pub const SEALED_VERSION: u16 = 2;
