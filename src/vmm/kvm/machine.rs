//! A virtual machine on KVM: memory, processors, interrupt controllers and timer by KVM, a serial port.

use std::sync::Arc;

use kvm_bindings::{
    KVM_MEM_LOG_DIRTY_PAGES, KVM_MP_STATE_RUNNABLE, KVM_PIT_SPEAKER_DUMMY, Msrs, Xsave, kvm_debugregs, kvm_mp_state,
    kvm_msr_entry, kvm_pit_config, kvm_regs, kvm_segment, kvm_userspace_memory_region, kvm_xsave,
};
use kvm_ioctls::{Cap, Kvm, VcpuFd, VmFd};
use zerocopy::IntoBytes;

use super::guest::{DEBUG_VALUE, GDT, Guest, IDT, KERNEL_GS_BASE, MODEL_VALUE, PAGE_TABLES, PROCESSORS_MAX, Start};
use super::kick;
use super::kvm_error;
use super::processor::{Board, Event, Processor};
use super::serial::Serial;
use super::shape::MemoryShape;
use super::state::{Readable, restore_chips, restore_processor, save_chips};
use super::vmstate::{Part, VmState};
use crate::capture::{DirtyLog, DirtyRing, GuestMemory, Tracker, Vm};
use crate::error::{Error, Result};
use crate::platform::lock::lock;

/// What tells which pages the guest writes to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Tracking {
    Log,
    /// Rings of so many entries.
    Ring(u32),
}

/// What a machine has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Spec {
    pub shape: MemoryShape,
    pub processors: u16,
    pub tracking: Tracking,
}

/// Where the guest's output goes, byte by byte.
pub type Output = Box<dyn FnMut(u8) + Send>;

/// A VM that does not run yet, or is paused, or runs.
pub struct Machine {
    // Dropped in this order: processors stop before what they use goes.
    processors: Vec<Processor>,
    board: Arc<Board>,
    shape: MemoryShape,
}

/// A machine, its memory, and who knows what it writes to.
pub struct Made {
    pub machine: Machine,
    pub memory: GuestMemory,
    pub tracker: Box<dyn Tracker>,
}

/// Where Intel's KVM keeps what it needs to run real mode: past all memory that a guest has below 4 GiB.
const TSS_ADDRESS: usize = 0xfffb_d000;

/// The parts of a machine before its processors have their state.
struct Frame {
    vm: Arc<VmFd>,
    memory: GuestMemory,
    ring: Option<DirtyRing>,
    processors: Vec<VcpuFd>,
    readable: Readable,
}

impl Frame {
    fn new(kvm: &Kvm, spec: &Spec) -> Result<Self> {
        if spec.processors == 0 || u64::from(spec.processors) > PROCESSORS_MAX {
            return Err(Error::usage(format!("a guest has 1 to {PROCESSORS_MAX} processors")));
        }
        kick::prepare()?;
        let vm = Arc::new(kvm.create_vm().map_err(kvm_error("cannot make a VM"))?);
        vm.set_tss_address(TSS_ADDRESS).map_err(kvm_error("cannot place the VM's task state"))?;
        vm.create_irq_chip().map_err(kvm_error("KVM emulates no interrupt controller"))?;
        let timer = kvm_pit_config { flags: KVM_PIT_SPEAKER_DUMMY, ..Default::default() };
        vm.create_pit2(timer).map_err(kvm_error("KVM emulates no timer"))?;
        let memory = GuestMemory::anonymous(spec.shape.parts().map(|(address, _, len)| (address, len)))?;
        let ring = match spec.tracking {
            Tracking::Log => None,
            Tracking::Ring(entries) => Some(DirtyRing::enable(&vm, &memory, entries)?),
        };
        for region in memory.regions() {
            let slot = kvm_userspace_memory_region {
                slot: region.slot,
                flags: KVM_MEM_LOG_DIRTY_PAGES,
                guest_phys_addr: region.guest_address,
                memory_size: region.len,
                userspace_addr: region.host_address,
            };
            // SAFETY: the memory is mapped as long as the capture has it, which is dropped after the processors, and
            // nobody in this process refers to it.
            unsafe { vm.set_user_memory_region(slot) }.map_err(kvm_error("cannot give the VM its memory"))?;
        }
        let make = |number| vm.create_vcpu(number).map_err(kvm_error("cannot make a processor"));
        let processors: Vec<VcpuFd> = (0..u64::from(spec.processors)).map(make).collect::<Result<_>>()?;
        if let Some(ring) = &ring {
            processors.iter().try_for_each(|processor| ring.add(processor))?;
        }
        Ok(Self { vm, memory, ring, processors, readable: Readable::default() })
    }

    /// Which model-specific registers there are depends on what the processor was told it has.
    fn find_readable(&mut self, kvm: &Kvm) -> Result<()> {
        let known = kvm.get_msr_index_list().map_err(kvm_error("cannot list model-specific registers"))?;
        self.readable = Readable::find(&self.processors[0], known.as_slice())?;
        Ok(())
    }

    fn finish(self, spec: &Spec, serial: Serial, output: Output) -> Result<Made> {
        let board = Board::new(self.vm.clone(), self.ring.clone(), self.readable, output);
        *lock(&board.serial) = serial;
        let board = Arc::new(board);
        let start = |(number, processor)| Processor::start(number, processor, board.clone());
        let processors = (0..).zip(self.processors).map(start).collect::<Result<_>>()?;
        let tracker: Box<dyn Tracker> = match self.ring {
            Some(ring) => Box::new(ring),
            None => Box::new(DirtyLog::new(self.vm, &self.memory)),
        };
        Ok(Made { machine: Machine { processors, board, shape: spec.shape }, memory: self.memory, tracker })
    }
}

impl Machine {
    /// A fresh machine with a guest in it, and the pages that were written for it: everything else is zeros.
    pub fn boot(spec: &Spec, guest: &Guest, output: Output) -> Result<(Made, Vec<u64>)> {
        let kvm = open_kvm()?;
        let mut frame = Frame::new(&kvm, spec)?;
        let mut written = Vec::new();
        for (address, bytes) in guest.image(&spec.shape)? {
            frame.memory.write(address, &bytes)?;
            let pages = address / 4096..(address + bytes.len() as u64).div_ceil(4096);
            written.extend(pages.filter_map(|page| frame.memory.page_of(page * 4096)));
        }
        for (number, processor) in (0..).zip(&frame.processors) {
            let start = guest.start(&spec.shape, number, u64::from(spec.processors))?;
            prepare_processor(&kvm, processor, number as u32, &start)?;
        }
        frame.find_readable(&kvm)?;
        Ok((frame.finish(spec, Serial::default(), output)?, written))
    }

    /// What a state says of its machine.
    pub fn spec_of(state: &VmState, tracking: Tracking) -> Result<Spec> {
        let bytes: &[u8; 20] = state
            .get(None, Part::Shape)?
            .try_into()
            .map_err(|_| Error::damaged("the state of the VM is damaged: Shape has another length"))?;
        let word = |at: usize| u64::from_le_bytes(bytes[at..at + 8].try_into().expect("eight bytes"));
        let processors = u32::from_le_bytes(bytes[16..].try_into().expect("four bytes"));
        let shape = MemoryShape::new(word(0), word(8)).map_err(|error| Error::damaged(error.to_string()))?;
        let processors = u16::try_from(processors)
            .ok()
            .filter(|count| (1..=PROCESSORS_MAX).contains(&u64::from(*count)))
            .ok_or_else(|| Error::damaged(format!("the state of the VM has {processors} processors")))?;
        Ok(Spec { shape, processors, tracking })
    }

    /// The machine that a state describes, without its memory's content. It is paused.
    pub fn restore(state: &VmState, tracking: Tracking, output: Output) -> Result<Made> {
        let spec = Self::spec_of(state, tracking)?;
        let kvm = open_kvm()?;
        let mut frame = Frame::new(&kvm, &spec)?;
        restore_chips(&frame.vm, state)?;
        for (number, processor) in (0..).zip(&frame.processors) {
            restore_processor(processor, &frame.vm, number, state)
                .map_err(|error| error.context(format!("processor {number}")))?;
        }
        frame.find_readable(&kvm)?;
        let serial = Serial::decode(state.get(None, Part::Serial)?)?;
        frame.finish(&spec, serial, output)
    }

    /// Waits for what a processor has to say, but not longer.
    pub fn wait(&self, time: std::time::Duration) -> Option<Event> {
        self.board.wait(time)
    }

    /// What processors share, for who waits for events elsewhere.
    pub fn board(&self) -> Arc<Board> {
        self.board.clone()
    }
}

impl Vm for Machine {
    fn pause(&mut self) -> Result<()> {
        self.processors.iter().try_for_each(Processor::pause)?;
        self.processors.iter().for_each(Processor::wait_stopped);
        Ok(())
    }

    fn state(&mut self) -> Result<Vec<u8>> {
        let mut state = VmState::default();
        let mut shape = [0; 20];
        shape[..8].copy_from_slice(&self.shape.len().to_le_bytes());
        shape[8..16].copy_from_slice(&self.shape.hole().to_le_bytes());
        shape[16..].copy_from_slice(&(self.processors.len() as u32).to_le_bytes());
        state.put(None, Part::Shape, shape.to_vec());
        let serial = lock(&self.board.serial).encode();
        state.put(None, Part::Serial, serial);
        for processor in &self.processors {
            state.extend(processor.state()?);
        }
        // Reading a local APIC may deliver what an interrupt controller holds, so these come last.
        save_chips(&self.board.vm, &mut state)?;
        Ok(state.encode())
    }

    fn resume(&mut self) -> Result<()> {
        self.processors.iter().for_each(Processor::resume);
        Ok(())
    }
}

/// How fast the time stamp of this host's processors runs, as KVM has it.
pub fn time_stamp_khz() -> Option<u32> {
    Kvm::new().ok()?.create_vm().ok()?.create_vcpu(0).ok()?.get_tsc_khz().ok()
}

fn open_kvm() -> Result<Kvm> {
    Kvm::new()
        .map_err(|error| kvm_error("/dev/kvm cannot be opened")(error).hint("`epochfs doctor` says what is missing"))
}

/// 64-bit mode, with everything mapped at its own address.
fn prepare_processor(kvm: &Kvm, processor: &VcpuFd, number: u32, start: &Start) -> Result<()> {
    let mut cpuid = kvm
        .get_supported_cpuid(kvm_bindings::KVM_MAX_CPUID_ENTRIES)
        .map_err(kvm_error("KVM does not say what processors it has"))?;
    for entry in cpuid.as_mut_slice() {
        match entry.function {
            1 => entry.ebx = entry.ebx & 0x00ff_ffff | number << 24,
            0xb | 0x1f => entry.edx = number,
            _ => {}
        }
    }
    processor.set_cpuid2(&cpuid).map_err(kvm_error("cannot say what processor it is"))?;
    let mut special = processor.get_sregs().map_err(kvm_error("cannot read segments"))?;
    let code = kvm_segment {
        base: 0,
        limit: u32::MAX,
        selector: 8,
        type_: 11,
        present: 1,
        s: 1,
        l: 1,
        g: 1,
        ..Default::default()
    };
    let data = kvm_segment { selector: 16, type_: 3, l: 0, db: 1, ..code };
    special.cs = code;
    (special.ds, special.es, special.fs, special.gs, special.ss) = (data, data, data, data, data);
    (special.gdt.base, special.gdt.limit) = (GDT, 23);
    (special.idt.base, special.idt.limit) = (IDT, 4095);
    special.cr0 = 0x8000_0033;
    special.cr3 = PAGE_TABLES;
    // Physical address extension, and vector registers.
    special.cr4 = 0x620;
    special.efer = 0x500;
    processor.set_sregs(&special).map_err(kvm_error("cannot set segments"))?;
    let all = &start.registers;
    let registers = kvm_regs {
        rax: all[0],
        rcx: all[1],
        rdx: all[2],
        rbx: all[3],
        rsp: all[4],
        rbp: all[5],
        rsi: all[6],
        rdi: all[7],
        r8: all[8],
        r9: all[9],
        r10: all[10],
        r11: all[11],
        r12: all[12],
        r13: all[13],
        r14: all[14],
        r15: all[15],
        rip: start.instruction,
        rflags: 2,
    };
    processor.set_regs(&registers).map_err(kvm_error("cannot set registers"))?;
    let debug = processor.get_debug_regs().map_err(kvm_error("cannot read debug registers"))?;
    let debug = kvm_debugregs { db: [DEBUG_VALUE, 0, 0, 0], ..debug };
    processor.set_debug_regs(&debug).map_err(kvm_error("cannot set debug registers"))?;
    let model = [kvm_msr_entry { index: KERNEL_GS_BASE, data: MODEL_VALUE, ..Default::default() }];
    let model = Msrs::from_entries(&model).map_err(|_| Error::usage("too many registers at a time"))?;
    processor.set_msrs(&model).map_err(kvm_error("cannot set model-specific registers"))?;
    processor
        .set_mp_state(kvm_mp_state { mp_state: KVM_MP_STATE_RUNNABLE })
        .map_err(kvm_error("cannot let a processor run"))
}

/// How long the vector registers' state is here.
fn vectors_len(vm: &VmFd) -> usize {
    usize::try_from(vm.check_extension_int(Cap::Xsave2)).unwrap_or(0).max(size_of::<kvm_xsave>())
}

fn vectors_buffer(len: usize) -> Result<Xsave> {
    let extra = (len - size_of::<kvm_xsave>()).div_ceil(4);
    Xsave::new(extra).map_err(|_| Error::usage("the vector registers take too much memory"))
}

/// The vector registers, with as much as the processor has.
pub(super) fn get_vectors(processor: &VcpuFd, vm: &VmFd) -> Result<Vec<u8>> {
    let len = vectors_len(vm);
    if len == size_of::<kvm_xsave>() {
        let xsave = processor.get_xsave().map_err(kvm_error("cannot read vector registers"))?;
        return Ok(xsave.region.as_bytes().to_vec());
    }
    let mut xsave = vectors_buffer(len)?;
    // SAFETY: the buffer has the length that KVM asks for, and this process turns no more features on.
    unsafe { processor.get_xsave2(&mut xsave) }.map_err(kvm_error("cannot read vector registers"))?;
    let mut bytes = xsave.as_fam_struct_ref().xsave.region.as_bytes().to_vec();
    bytes.extend_from_slice(xsave.as_slice().as_bytes());
    Ok(bytes)
}

/// Sets vector registers that may come from a host with more of them or fewer, as long as what is beyond is zeros.
pub(super) fn set_vectors(processor: &VcpuFd, vm: &VmFd, bytes: &[u8]) -> Result<()> {
    let base = size_of::<kvm_xsave>();
    if bytes.len() < base || !bytes.len().is_multiple_of(4) {
        return Err(Error::damaged(format!("the state of the VM is damaged: Vectors has {} bytes", bytes.len())));
    }
    let len = vectors_len(vm);
    let (fits, beyond) = bytes.split_at(bytes.len().min(len.next_multiple_of(4)));
    if beyond.iter().any(|byte| *byte != 0) {
        return Err(Error::usage("the VM used vector registers that this host does not have")
            .hint("restore it on a host with the same processor features"));
    }
    let mut xsave = vectors_buffer(len)?;
    let words: Vec<u32> =
        fits.chunks_exact(4).map(|word| u32::from_le_bytes(word.try_into().expect("four bytes"))).collect();
    // SAFETY: the length of what follows the structure is not changed.
    let inner = unsafe { xsave.as_mut_fam_struct() };
    inner.xsave.region.copy_from_slice(&words[..base / 4]);
    let extra = &words[base / 4..];
    xsave.as_mut_slice()[..extra.len()].copy_from_slice(extra);
    // SAFETY: the buffer has the length that KVM asks for.
    unsafe { processor.set_xsave2(&xsave) }.map_err(kvm_error("cannot set vector registers"))
}
