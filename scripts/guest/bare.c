/* A guest without an operating system, for monitors that start a 64-bit ELF in long mode with its memory mapped at its own
   address. It counts in its memory, proves every page before it writes to it again, and says on its serial port how far it
   is. It is compiled by scripts/guest-firecracker. */

typedef unsigned long word;

enum { PAGES = 2048, WORDS = 512, STEP = 64, ROUNDS_PER_TICK = 256 };

/* Pages 0 to PAGES - 1, at 16 MiB. The first word of each is how often it was written. */
static volatile word *const pages = (word *)(16UL << 20);

static void put_byte(char byte)
{
    __asm__ volatile("outb %0, %1" : : "a"(byte), "Nd"((unsigned short)0x3f8));
}

static void say(const char *text)
{
    while (*text)
        put_byte(*text++);
}

static void say_number(word number)
{
    char digits[20];
    int count = 0;
    do
        digits[count++] = '0' + number % 10;
    while (number /= 10);
    while (count)
        put_byte(digits[--count]);
}

/* What a word of a page holds after so many writes. */
static word expected(word page, word at, word generation)
{
    return (page * WORDS + at + 1) * 6364136223846793005UL + generation * 1442695040888963407UL;
}

static void fail(const char *what, word page)
{
    say("bare: failed: ");
    say(what);
    say(" of page ");
    say_number(page);
    say("\n");
    for (;;)
        __asm__ volatile("cli; hlt");
}

void run(void)
{
    /* The count is in memory, and in a register that nothing writes back: they must agree for ever. */
    static volatile word counted;
    for (word count = 0;; count++) {
        word page = count % PAGES, generation = count / PAGES;
        volatile word *words = pages + page * WORDS;
        if (counted != count)
            fail("the count is not that", page);
        if (words[0] != generation)
            fail("the number of writes is not that", page);
        for (word at = STEP; generation && at < WORDS; at += STEP)
            if (words[at] != expected(page, at, generation))
                fail("a word is not that", page);
        for (word at = STEP; at < WORDS; at += STEP)
            words[at] = expected(page, at, generation + 1);
        words[0] = generation + 1;
        counted = count + 1;
        if (count % ROUNDS_PER_TICK == 0) {
            say("bare: tick ");
            say_number(count / ROUNDS_PER_TICK);
            say("\n");
        }
    }
}

__asm__(".globl start\nstart:\n mov $stack_end, %rsp\n call run\n.bss\n.balign 16\n.skip 4096\nstack_end:\n.text\n");
