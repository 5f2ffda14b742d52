//! What hosts say of themselves, again and again, and what they are told to be there for.

use std::sync::Arc;

use crate::error::{Result, invalid};
use crate::name::check_machine;
use crate::wire::{Put, Reader, head, open, sealed};

const HEARTBEAT_MAGIC: [u8; 8] = *b"EPOCHHBT";
const ORDER_MAGIC: [u8; 8] = *b"EPOCHHOR";

/// The most machines that one heartbeat names, and the most of which it says how warm the cache is.
pub const HOST_MACHINES_MAX: usize = 1 << 16;

/// The most features of processors that one heartbeat names.
pub const HOST_FEATURES_MAX: usize = 1024;

/// What a host is there for.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum HostPurpose {
    /// It runs machines, and takes those of hosts that failed.
    #[default]
    Ready,
    /// It runs the machines that it has, and takes no others.
    Draining,
    /// It takes no machines, and its silence is no failure.
    Maintenance,
}

impl HostPurpose {
    pub const ALL: [Self; 3] = [Self::Ready, Self::Draining, Self::Maintenance];

    /// In a word.
    pub fn name(self) -> &'static str {
        match self {
            Self::Ready => "ready",
            Self::Draining => "draining",
            Self::Maintenance => "maintenance",
        }
    }

    fn code(self) -> u8 {
        match self {
            Self::Ready => 0,
            Self::Draining => 1,
            Self::Maintenance => 2,
        }
    }

    fn read(what: &'static str, from: &mut Reader<'_>) -> Result<Self> {
        let code = from.u8()?;
        Self::ALL
            .into_iter()
            .find(|purpose| purpose.code() == code)
            .map_or_else(|| invalid(what, "what the host is there for is unknown"), Ok)
    }
}

/// A machine that a host owns.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostMachine {
    pub machine: Arc<str>,
    /// Whether it runs there, and would be ended there before the host's lease is over.
    pub is_protected: bool,
}

/// How much of a machine's newest epoch a host has at hand.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostWarmth {
    pub machine: Arc<str>,
    pub bytes: u64,
}

/// What a host says of itself under rising numbers for as long as it lives.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Heartbeat {
    pub repository: [u8; 16],
    pub host: [u8; 16],
    pub number: u64,
    /// For people.
    pub name: String,
    /// Where it is, outermost part first, with slashes between the parts; empty if that was not said.
    pub location: String,
    pub purpose: HostPurpose,
    /// Whether somebody there starts machines of hosts that failed.
    pub is_accepting: bool,
    /// For how long machines that it owns are its own behind a heartbeat; 0: until somebody says otherwise.
    pub lease_ms: u32,
    /// How often it says so.
    pub interval_ms: u32,
    /// In bytes.
    pub memory: u64,
    pub memory_free: u64,
    pub cpus: u32,
    /// Processes that run or wait to, in thousandths, a mean of the last minute.
    pub load_milli: u32,
    /// What its processors have, in rising order.
    pub features: Vec<String>,
    /// What it owns, in rising order.
    pub machines: Vec<HostMachine>,
    /// What is known of its cache, in rising order of machines.
    pub warmth: Vec<HostWarmth>,
}

impl Heartbeat {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = head(HEARTBEAT_MAGIC, &self.repository);
        out.put(&self.host);
        out.put_u64(self.number);
        put_text(&self.name, &mut out);
        put_text(&self.location, &mut out);
        out.put_u8(self.purpose.code());
        out.put_flag(self.is_accepting);
        out.put_u32(self.lease_ms);
        out.put_u32(self.interval_ms);
        out.put_u64(self.memory);
        out.put_u64(self.memory_free);
        out.put_u32(self.cpus);
        out.put_u32(self.load_milli);
        out.put_u16(u16::try_from(self.features.len()).expect("a heartbeat names at most 1,024 features"));
        self.features.iter().for_each(|feature| out.put_short(feature.as_bytes()));
        out.put_u32(u32::try_from(self.machines.len()).expect("a heartbeat names at most 65,536 machines"));
        for machine in &self.machines {
            out.put_short(machine.machine.as_bytes());
            out.put_flag(machine.is_protected);
        }
        out.put_u32(u32::try_from(self.warmth.len()).expect("a heartbeat names at most 65,536 machines"));
        for warmth in &self.warmth {
            out.put_short(warmth.machine.as_bytes());
            out.put_u64(warmth.bytes);
        }
        sealed(out)
    }

    /// Decodes a heartbeat of this repository; whose it is, and its number, are for the caller to compare with its key.
    pub fn decode(bytes: &[u8], repository: &[u8; 16]) -> Result<Self> {
        const WHAT: &str = "heartbeat";
        let mut from = open(WHAT, HEARTBEAT_MAGIC, bytes, repository)?;
        let (host, number) = (from.array()?, from.u64()?);
        let (name, location) = (from.short_text()?.to_owned(), from.short_text()?.to_owned());
        let (purpose, is_accepting) = (HostPurpose::read(WHAT, &mut from)?, from.flag()?);
        let (lease_ms, interval_ms) = (from.u32()?, from.u32()?);
        let (memory, memory_free, cpus, load_milli) = (from.u64()?, from.u64()?, from.u32()?, from.u32()?);
        let count = usize::from(from.u16()?);
        if count > HOST_FEATURES_MAX {
            return invalid(WHAT, "it names too many features");
        }
        let mut features = Vec::with_capacity(from.bounded(count, 1)?);
        for _ in 0..count {
            features.push(from.short_text()?.to_owned());
        }
        let count = count_of_machines(WHAT, &mut from)?;
        let mut machines = Vec::with_capacity(from.bounded(count, 1 + 1)?);
        for _ in 0..count {
            machines.push(HostMachine { machine: read_machine(&mut from)?, is_protected: from.flag()? });
        }
        let count = count_of_machines(WHAT, &mut from)?;
        let mut warmth = Vec::with_capacity(from.bounded(count, 1 + 8)?);
        for _ in 0..count {
            warmth.push(HostWarmth { machine: read_machine(&mut from)?, bytes: from.u64()? });
        }
        from.end()?;
        let is_ordered = features.is_sorted_by(|a, b| a < b)
            && machines.is_sorted_by(|a, b| a.machine < b.machine)
            && warmth.is_sorted_by(|a, b| a.machine < b.machine);
        if !is_ordered {
            return invalid(WHAT, "a list of it is not in order");
        }
        Ok(Self {
            repository: *repository,
            host,
            number,
            name,
            location,
            purpose,
            is_accepting,
            lease_ms,
            interval_ms,
            memory,
            memory_free,
            cpus,
            load_milli,
            features,
            machines,
            warmth,
        })
    }
}

/// What a host is told to be there for. The one with the highest number counts.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct HostOrder {
    pub repository: [u8; 16],
    pub host: [u8; 16],
    pub number: u64,
    pub purpose: HostPurpose,
    /// When, by the writer's clock, and from where. For people only.
    pub time_ns: u64,
    pub by: String,
}

impl HostOrder {
    pub fn encode(&self) -> Vec<u8> {
        let mut out = head(ORDER_MAGIC, &self.repository);
        out.put(&self.host);
        out.put_u64(self.number);
        out.put_u8(self.purpose.code());
        out.put_u64(self.time_ns);
        put_text(&self.by, &mut out);
        sealed(out)
    }

    pub fn decode(bytes: &[u8], repository: &[u8; 16]) -> Result<Self> {
        const WHAT: &str = "order to a host";
        let mut from = open(WHAT, ORDER_MAGIC, bytes, repository)?;
        let (host, number) = (from.array()?, from.u64()?);
        let purpose = HostPurpose::read(WHAT, &mut from)?;
        let (time_ns, by) = (from.u64()?, from.short_text()?.to_owned());
        from.end()?;
        Ok(Self { repository: *repository, host, number, purpose, time_ns, by })
    }
}

/// As much of a text for people as fits.
fn put_text(text: &str, out: &mut Vec<u8>) {
    let end = (0..=text.len().min(255)).rfind(|end| text.is_char_boundary(*end));
    out.put_short(&text.as_bytes()[..end.unwrap_or(0)]);
}

fn count_of_machines(what: &'static str, from: &mut Reader<'_>) -> Result<usize> {
    match from.u32()? as usize {
        count if count > HOST_MACHINES_MAX => invalid(what, "it names too many machines"),
        count => Ok(count),
    }
}

fn read_machine(from: &mut Reader<'_>) -> Result<Arc<str>> {
    let machine = from.short_text()?;
    check_machine(machine)?;
    Ok(machine.into())
}
