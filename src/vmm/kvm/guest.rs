//! The guests that `epochfs run` runs: bare-metal programs that this project assembles itself.
//!
//! All of a guest's memory is mapped at its own address, by pages of 2 MiB. Its processors share nothing but the code:
//! each has pages of its own to work on, numbered from [`WORK_START`] on and past the hole in the memory.
//!
//! [`Counter`] keeps pairs in its pages, a count and a word that follows from it, and proves each pair that it touches;
//! its registers, a vector register, a debug register and a model-specific one are part of what it proves. What its memory
//! holds follows from its count alone, so that tests can say what every byte of an epoch must be.
//! [`Load`] writes to pages at a rate and with a locality that are chosen. An idle guest does nothing, and takes no processor.

use super::assembler::Reg::{R8, R9, R10, R11, R12, R13, R14, R15, Rax, Rbp, Rbx, Rcx, Rdi, Rdx, Rsi};
use super::assembler::{Assembler, Label, When};
use super::shape::MemoryShape;
use crate::error::{Error, Result};

/// Where things lie in a guest's memory.
pub const GDT: u64 = 0x1000;
pub const IDT: u64 = 0x2000;
pub const PAGE_TABLES: u64 = 0x10000;
pub const CODE: u64 = 0x40000;
/// 256 bytes for each processor, which the host may read while the guest runs.
pub const BOARD: u64 = 0x50000;
pub const BOARD_LEN: u64 = 256;
/// Where on its board a processor notes what it reports.
pub const REPORTED: u64 = 16;
/// Times that the timer interrupted, as a word.
pub const TICKS: u64 = 0x51000;
/// Each processor's stack ends 4 KiB after the one before.
pub const STACKS: u64 = 0x60000;
pub const WORK_START: u64 = 0x20_0000;

/// What guests write to when they have something to report.
pub const REPORT_PORT: u16 = 0x510;
pub const SERIAL_PORT: u16 = 0x3f8;

/// The multiplier of the guests' random numbers, and of the words that prove counts.
pub const MULTIPLIER: u64 = 6_364_136_223_846_793_005;
pub const INCREMENT: i32 = 1_013_904_223;

/// What the debug register and the model-specific register of a counter hold.
pub const DEBUG_VALUE: u64 = 0x0000_7fff_1234_5670;
pub const MODEL_VALUE: u64 = 0x0000_7abc_def0_1230;
pub const KERNEL_GS_BASE: u32 = 0xc000_0102;

/// The processors whose stacks and boards there is room for.
pub const PROCESSORS_MAX: u64 = 16;

const PAGE: u64 = 4096;

/// What a guest reports, as the number it writes to [`REPORT_PORT`].
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Report {
    Finished,
    /// A pair in memory does not fit together.
    WrongPair,
    /// The counts in memory are not as many as were made.
    WrongSum,
    WrongVector,
    WrongDebug,
    WrongModel,
    Unknown(u32),
}

impl Report {
    pub fn of(number: u32) -> Self {
        let known =
            [Self::Finished, Self::WrongPair, Self::WrongSum, Self::WrongVector, Self::WrongDebug, Self::WrongModel];
        known.into_iter().find(|report| report.number() == number).unwrap_or(Self::Unknown(number))
    }

    fn number(self) -> u32 {
        match self {
            Self::Finished => 1,
            Self::WrongPair => 2,
            Self::WrongSum => 3,
            Self::WrongVector => 4,
            Self::WrongDebug => 5,
            Self::WrongModel => 6,
            Self::Unknown(number) => number,
        }
    }
}

impl std::fmt::Display for Report {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(match self {
            Self::Finished => "it is finished",
            Self::WrongPair => "a page holds what was never written there",
            Self::WrongSum => "its pages hold more or less than was counted",
            Self::WrongVector => "its vector register lost its value",
            Self::WrongDebug => "its debug register lost its value",
            Self::WrongModel => "its model-specific register lost its value",
            Self::Unknown(number) => return write!(f, "it reports {number}, which means nothing"),
        })
    }
}

/// A guest that counts, and proves what it counted.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Counter {
    /// Ends when each processor has counted so far; 0 for never.
    pub target: u64,
    /// Every 2^n counts all pages are proven, and their sum.
    pub sweep_bits: Option<u32>,
    /// Every 2^n counts the first processor prints its count.
    pub print_bits: Option<u32>,
    /// The first processor is interrupted by the timer, about a hundred times a second.
    pub has_timer: bool,
}

/// A guest that writes to pages.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Load {
    /// Ticks of the time stamp between two writes; 0 for as many as it can.
    pub period: u64,
    /// So many of 256 writes go to the hot pages.
    pub hot_share: u8,
    /// The first pages of each processor; all if 0.
    pub hot_pages: u64,
    /// Rounds of a loop before each write.
    pub work: u32,
    /// Writes what is there already.
    pub is_same: bool,
    /// How many pages it uses; all if 0.
    pub pages: u64,
}

/// A program.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Guest {
    Counter(Counter),
    Load(Load),
    /// Its processors are halted.
    Idle,
}

/// What the registers of a processor hold at the beginning.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Start {
    pub registers: [u64; 16],
    pub instruction: u64,
}

impl Guest {
    /// The bytes that lie in memory at the beginning, by address.
    pub fn image(&self, shape: &MemoryShape) -> Result<Vec<(u64, Vec<u8>)>> {
        let mut code = Assembler::default();
        let interrupt = match self {
            Self::Counter(counter) => counter.assemble(&mut code),
            Self::Load(load) => {
                load.assemble(&mut code);
                None
            }
            Self::Idle => {
                halt(&mut code);
                None
            }
        };
        let interrupt = interrupt.map(|label| CODE + code.offset(label));
        let mut image = vec![(GDT, gdt()), (PAGE_TABLES, page_tables(shape)?), (CODE, code.finish())];
        if let Some(handler) = interrupt {
            image.push((IDT, idt(handler)));
        }
        Ok(image)
    }

    /// The pages that each processor has, and the first of them.
    fn share(&self, shape: &MemoryShape, processor: u64, processors: u64) -> (u64, u64) {
        let all = shape.len().saturating_sub(WORK_START) / PAGE;
        let all = match self {
            Self::Load(load) if load.pages > 0 => all.min(load.pages),
            _ => all,
        };
        (all / processors, all / processors * processor)
    }

    /// How a processor starts.
    pub fn start(&self, shape: &MemoryShape, processor: u64, processors: u64) -> Result<Start> {
        let (pages, first) = self.share(shape, processor, processors);
        if pages == 0 {
            return Err(Error::usage(format!(
                "{} bytes of memory leave no page for the guest to work on",
                shape.len()
            ))
            .hint("give it at least 4M"));
        }
        let mut registers = [0; 16];
        let mut set = |register: super::assembler::Reg, value| registers[register as usize] = value;
        set(R8, seed_of(processor));
        set(R9, MULTIPLIER);
        set(R10, pages);
        set(R11, first);
        set(R14, (shape.low_len() - WORK_START) / PAGE);
        set(R15, shape.hole_len());
        set(Rbp, BOARD + processor * BOARD_LEN);
        set(super::assembler::Reg::Rsp, STACKS + (processor + 1) * PAGE);
        // Only the first one has the timer and prints.
        set(Rsi, processor);
        Ok(Start { registers, instruction: CODE })
    }
}

/// What the random numbers of a processor begin with.
pub fn seed_of(processor: u64) -> u64 {
    0x1234_5678_9abc_def1 ^ processor << 40
}

/// Null, code and data.
fn gdt() -> Vec<u8> {
    [0_u64, 0x00af_9b00_0000_ffff, 0x00cf_9300_0000_ffff].iter().flat_map(|entry| entry.to_le_bytes()).collect()
}

/// All interrupts go to one handler: there is one.
fn idt(handler: u64) -> Vec<u8> {
    let gate = handler & 0xffff | 8 << 16 | 0x8e00 << 32 | (handler >> 16 & 0xffff) << 48;
    (0..256).flat_map(|_| [gate, handler >> 32]).flat_map(u64::to_le_bytes).collect()
}

/// One table of the fourth level, one of the third, and one of the second for each GiB up to the end of memory.
fn page_tables(shape: &MemoryShape) -> Result<Vec<u8>> {
    const PRESENT_WRITABLE: u64 = 3;
    const LARGE: u64 = 1 << 7;
    let gigabytes = shape.end().div_ceil(1 << 30);
    if PAGE_TABLES + (2 + gigabytes) * PAGE > CODE {
        return Err(Error::usage(format!("a guest's memory ends at 46 GiB at most, and not at {:#x}", shape.end())));
    }
    let mut tables = vec![0_u64; (2 + gigabytes as usize) * 512];
    tables[0] = (PAGE_TABLES + PAGE) | PRESENT_WRITABLE;
    for gigabyte in 0..gigabytes {
        tables[512 + gigabyte as usize] = (PAGE_TABLES + (2 + gigabyte) * PAGE) | PRESENT_WRITABLE;
    }
    for (at, entry) in tables[1024..].iter_mut().enumerate() {
        *entry = (at as u64) << 21 | PRESENT_WRITABLE | LARGE;
    }
    Ok(tables.into_iter().flat_map(u64::to_le_bytes).collect())
}

/// `rax`, the number of a page, becomes `rdi`, its address.
fn locate(code: &mut Assembler) {
    let below = code.label();
    code.copy(Rdi, Rax);
    code.shift_left(Rdi, 12);
    code.add_number(Rdi, WORK_START as i32);
    code.compare(Rax, R14);
    code.jump_if(When::Below, below);
    code.add(Rdi, R15);
    code.place(below);
}

/// The next random number: `r8`.
fn next_random(code: &mut Assembler) {
    code.multiply(R8, R9);
    code.add_number(R8, INCREMENT);
}

/// Reports what is in `rax`, and stops this processor.
fn report(code: &mut Assembler) {
    // Whoever restores it learns what it has reported already, for it does not say it again.
    code.store(Rbp, REPORTED as i32, Rax);
    code.set(Rdx, u64::from(REPORT_PORT));
    code.out_word_dx();
    halt(code);
}

/// Stops this processor.
fn halt(code: &mut Assembler) {
    let again = code.here();
    code.halt();
    code.jump(again);
}

/// A way to report from anywhere.
fn failure(code: &mut Assembler, label: Label, what: Report) {
    code.place(label);
    code.set(Rax, u64::from(what.number()));
    report(code);
}

impl Counter {
    /// Returns where the interrupt handler begins, if there is one.
    fn assemble(&self, code: &mut Assembler) -> Option<Label> {
        let [wrong_pair, wrong_sum, wrong_vector, wrong_debug, wrong_model] = [(); 5].map(|()| code.label());
        let print = code.label();
        if self.has_timer {
            let no_timer = code.label();
            code.compare_number(Rsi, 0);
            code.jump_if(When::NotEqual, no_timer);
            start_timer(code);
            code.place(no_timer);
        }
        code.copy(R13, Rsi);
        keep_in_vector(code);

        let again = code.here();
        code.store_vector(Rbp, VECTOR_CHECKED, 5);
        code.load(Rax, Rbp, VECTOR_CHECKED + 8);
        code.compare(Rax, Rbx);
        code.jump_if(When::NotEqual, wrong_vector);
        next_random(code);
        code.copy(Rax, R8);
        code.shift_right(Rax, 33);
        code.multiply(Rax, R10);
        code.shift_right(Rax, 31);
        code.add(Rax, R11);
        locate(code);
        // One of four pairs in the page.
        code.copy(Rcx, R8);
        code.shift_right(Rcx, 20);
        code.and_number(Rcx, 3);
        code.shift_left(Rcx, 10);
        code.add(Rdi, Rcx);
        prove(code, wrong_pair);
        code.add_number(Rdx, 1);
        code.copy(R12, Rdx);
        code.xor(R12, Rdi);
        code.multiply(R12, R9);
        code.store(Rdi, 0, Rdx);
        code.store(Rdi, 8, R12);
        code.add_number(Rbx, 1);
        keep_in_vector(code);
        code.store(Rbp, 0, Rbx);

        let go_on = code.label();
        code.copy(Rax, Rbx);
        code.and_number(Rax, 255);
        code.jump_if(When::NotEqual, go_on);
        prove_registers(code, wrong_debug, wrong_model);
        code.place(go_on);
        if let Some(bits) = self.sweep_bits {
            every(code, bits, |code| self.sweep(code, wrong_pair, wrong_sum));
        }
        if let Some(bits) = self.print_bits {
            every(code, bits, |code| {
                let silent = code.label();
                code.compare_number(R13, 0);
                code.jump_if(When::NotEqual, silent);
                code.call(print);
                code.place(silent);
            });
        }
        if self.target > 0 {
            code.set(Rax, self.target);
            code.compare(Rbx, Rax);
            code.jump_if(When::Below, again);
            self.sweep(code, wrong_pair, wrong_sum);
            code.set(Rax, u64::from(Report::Finished.number()));
            report(code);
        } else {
            code.jump(again);
        }

        failure(code, wrong_pair, Report::WrongPair);
        failure(code, wrong_sum, Report::WrongSum);
        failure(code, wrong_vector, Report::WrongVector);
        failure(code, wrong_debug, Report::WrongDebug);
        failure(code, wrong_model, Report::WrongModel);
        code.place(print);
        print_count(code);
        self.has_timer.then(|| {
            let handler = code.here();
            count_tick(code);
            handler
        })
    }

    /// Proves all pairs of this processor, and that their counts add up.
    fn sweep(&self, code: &mut Assembler, wrong_pair: Label, wrong_sum: Label) {
        code.set(Rcx, 0);
        code.set(Rsi, 0);
        let next_page = code.here();
        code.copy(Rax, Rcx);
        code.add(Rax, R11);
        locate(code);
        for _ in 0..4 {
            prove(code, wrong_pair);
            code.add(Rsi, Rdx);
            code.add_number(Rdi, 1024);
        }
        code.add_number(Rcx, 1);
        code.compare(Rcx, R10);
        code.jump_if(When::NotEqual, next_page);
        code.compare(Rsi, Rbx);
        code.jump_if(When::NotEqual, wrong_sum);
    }
}

/// Where a processor's board has the two words that go to its vector register, and those that come from it.
const VECTOR: i32 = 64;
const VECTOR_CHECKED: i32 = 80;

/// The count goes to both halves of a vector register.
fn keep_in_vector(code: &mut Assembler) {
    code.store(Rbp, VECTOR, Rbx);
    code.store(Rbp, VECTOR + 8, Rbx);
    code.load_vector(5, Rbp, VECTOR);
}

/// Every 2^bits counts.
fn every(code: &mut Assembler, bits: u32, what: impl FnOnce(&mut Assembler)) {
    let not_now = code.label();
    code.copy(Rax, Rbx);
    code.and_number(Rax, (1 << bits.min(30)) - 1);
    code.jump_if(When::NotEqual, not_now);
    what(code);
    code.place(not_now);
}

/// Proves the pair at `rdi`, whose count is in `rdx` then: both zero, or the second what follows from the first.
fn prove(code: &mut Assembler, wrong: Label) {
    let (is_new, right) = (code.label(), code.label());
    code.load(Rdx, Rdi, 0);
    code.load(R12, Rdi, 8);
    code.compare_number(Rdx, 0);
    code.jump_if(When::Equal, is_new);
    code.copy(Rax, Rdx);
    code.xor(Rax, Rdi);
    code.multiply(Rax, R9);
    code.compare(Rax, R12);
    code.jump_if(When::NotEqual, wrong);
    code.jump(right);
    code.place(is_new);
    code.compare_number(R12, 0);
    code.jump_if(When::NotEqual, wrong);
    code.place(right);
}

fn prove_registers(code: &mut Assembler, wrong_debug: Label, wrong_model: Label) {
    code.read_debug(Rax, 0);
    code.set(Rdx, DEBUG_VALUE);
    code.compare(Rax, Rdx);
    code.jump_if(When::NotEqual, wrong_debug);
    code.set(Rcx, u64::from(KERNEL_GS_BASE));
    code.read_model_register();
    code.shift_left(Rdx, 32);
    code.or(Rax, Rdx);
    code.set(Rdx, MODEL_VALUE);
    code.compare(Rax, Rdx);
    code.jump_if(When::NotEqual, wrong_model);
}

/// Prints `rbx` in sixteen digits, on a line of its own.
fn print_count(code: &mut Assembler) {
    code.copy(Rsi, Rbx);
    code.set(Rdx, u64::from(SERIAL_PORT));
    code.set(Rcx, 16);
    let digit = code.here();
    let decimal = code.label();
    code.copy(Rax, Rsi);
    code.shift_right(Rax, 60);
    code.shift_left(Rsi, 4);
    code.add_number(Rax, i32::from(b'0'));
    code.compare_number(Rax, i32::from(b'0') + 10);
    code.jump_if(When::Below, decimal);
    code.add_number(Rax, i32::from(b'a' - b'0' - 10));
    code.place(decimal);
    code.out_byte_dx();
    code.add_number(Rcx, -1);
    code.jump_if(When::NotEqual, digit);
    code.set(Rax, u64::from(b'\n'));
    code.out_byte_dx();
    code.ret();
}

/// The interrupt controller, with its interrupts from 32 on and only the timer's let through; and the timer, about a
/// hundred times a second.
fn start_timer(code: &mut Assembler) {
    const DIVISOR: u64 = 11_932;
    for (port, value) in [
        (0x20, 0x11),
        (0x21, 0x20),
        (0x21, 0x04),
        (0x21, 0x01),
        (0xa0, 0x11),
        (0xa1, 0x28),
        (0xa1, 0x02),
        (0xa1, 0x01),
        (0x21, 0xfe),
        (0xa1, 0xff),
        (0x43, 0x34),
        (0x40, DIVISOR & 0xff),
        (0x40, DIVISOR >> 8),
    ] {
        code.set(Rax, value);
        code.out_byte(port);
    }
    code.allow_interrupts();
}

fn count_tick(code: &mut Assembler) {
    code.push(Rax);
    code.push(Rdi);
    code.set(Rdi, TICKS);
    code.load(Rax, Rdi, 0);
    code.add_number(Rax, 1);
    code.store(Rdi, 0, Rax);
    code.set(Rax, 0x20);
    code.out_byte(0x20);
    code.pop(Rdi);
    code.pop(Rax);
    code.return_from_interrupt();
}

impl Load {
    fn assemble(&self, code: &mut Assembler) {
        if self.period > 0 {
            code.read_time_stamp();
            code.shift_left(Rdx, 32);
            code.or(Rax, Rdx);
            code.copy(R13, Rax);
        }
        let again = code.here();
        if self.period > 0 {
            let due = code.label();
            let wait = code.here();
            code.read_time_stamp();
            code.shift_left(Rdx, 32);
            code.or(Rax, Rdx);
            code.compare(Rax, R13);
            code.jump_if(When::AboveOrEqual, due);
            code.add_number(R12, 1);
            code.jump(wait);
            code.place(due);
            code.set(Rax, self.period);
            code.add(R13, Rax);
        }
        if self.work > 0 {
            code.set(Rcx, u64::from(self.work));
            let round = code.here();
            code.add_number(R12, 1);
            code.add_number(Rcx, -1);
            code.jump_if(When::NotEqual, round);
        }
        next_random(code);
        code.copy(Rax, R8);
        code.shift_right(Rax, 33);
        let (all, chosen) = (code.label(), code.label());
        if self.hot_share > 0 && self.hot_pages > 0 {
            code.copy(Rcx, R8);
            code.shift_right(Rcx, 12);
            code.and_number(Rcx, 255);
            code.compare_number(Rcx, i32::from(self.hot_share));
            code.jump_if(When::AboveOrEqual, all);
            code.set(Rcx, self.hot_pages);
            code.multiply(Rax, Rcx);
            code.jump(chosen);
        }
        code.place(all);
        code.multiply(Rax, R10);
        code.place(chosen);
        code.shift_right(Rax, 31);
        code.add(Rax, R11);
        locate(code);
        code.add_number(Rbx, 1);
        if self.is_same {
            // What the page has there after its first write.
            code.store(Rdi, 0, R9);
        } else {
            code.copy(Rcx, R8);
            code.shift_right(Rcx, 20);
            code.and_number(Rcx, 0xff8);
            code.add(Rdi, Rcx);
            code.store(Rdi, 0, Rbx);
        }
        code.store(Rbp, 0, Rbx);
        code.store(Rbp, 8, R12);
        code.jump(again);
    }
}
