/* Preloaded in front of the C library: counts the system calls that touch files below one folder, and at a chosen
 * one kills the process, raises a signal, fails, or moves fewer bytes than it was asked to.
 *
 * Armed by faults_arm() (through ctypes, after the interpreter has started) or by the environment variable FAULTS,
 * whose fields are the arguments of faults_arm(), each on a line of its own. Everything is done with syscall(2), so
 * the counted calls are the real ones. Linux only. */

#define _GNU_SOURCE
#include <errno.h>
#include <fcntl.h>
#include <linux/fs.h>
#include <signal.h>
#include <stdarg.h>
#include <stdatomic.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/syscall.h>
#include <sys/uio.h>
#include <unistd.h>

#define PATH 4096
#define ALL 0x7fffffffffffffffL

static int armed, no_exchange;
static char root[PATH], calls[256], part_of_path[PATH], action[32];
static long first, last, argument;
static int log_fd = -1;
static atomic_long counted;

/* root: calls on paths outside of it are left alone. calls: names that count, each between spaces, or "" for all.
 * part: counts only if a path contains it, or "". first, last: the numbers of the calls (from 1) at which `action`
 * happens. log: a file that gets a line for every counted call, or "". */
void faults_arm(const char *root_, const char *calls_, const char *part, long first_, long last_,
                const char *action_, long argument_, const char *log)
{
    snprintf(root, sizeof root, "%s", root_);
    calls[0] = 0;
    if (*calls_)
        snprintf(calls, sizeof calls, " %s ", calls_);
    snprintf(part_of_path, sizeof part_of_path, "%s", part);
    snprintf(action, sizeof action, "%s", action_);
    first = first_, last = last_ ? last_ : ALL, argument = argument_;
    if (*log)
        log_fd = syscall(SYS_openat, AT_FDCWD, log, O_WRONLY | O_CREAT | O_APPEND | O_CLOEXEC, 0666);
    atomic_store(&counted, 0);
    armed = 1;
}

/* From here on, two folders cannot be swapped in one step, as on file systems that do not implement it. */
void faults_no_exchange(void) { no_exchange = 1; }

__attribute__((constructor)) static void from_environment(void)
{
    char *given = getenv("FAULTS"), *field[8];
    if (!given)
        return;
    given = strdup(given);
    for (int i = 0; i < 8; i++) {
        field[i] = given ? given : "";
        if (given && (given = strchr(given, '\n')))
            *given++ = 0;
    }
    faults_arm(field[0], field[1], field[2], atol(field[3]), atol(field[4]), field[5], atol(field[6]), field[7]);
}

static void of_fd(int fd, char *into)
{
    char link[64];
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    long n = syscall(SYS_readlinkat, AT_FDCWD, link, into, PATH - 1);
    into[n > 0 ? n : 0] = 0;
}

static void of_path(int folder, const char *path, char *into)
{
    if (*path == '/') {
        snprintf(into, PATH, "%s", path);
        return;
    }
    if (folder == AT_FDCWD) {
        if (syscall(SYS_getcwd, into, PATH) < 0)
            *into = 0;
    } else {
        of_fd(folder, into);
    }
    size_t n = strlen(into);
    snprintf(into + n, PATH - n, "/%s", path);
}

static int is(const char *what) { return strcmp(action, what) == 0; }

/* What a call has to do about itself: nothing, or one of the things that change it. */
enum { AS_IT_IS, FAIL, ONE_BYTE, HALF, END, HALF_THEN_DIE };

static void die(void)
{
    syscall(SYS_kill, (int)getpid(), SIGKILL);
    for (;;)
        pause();
}

struct call {
    const char *name;
    long number;
    int hit;
    char path[PATH], other[PATH];
};

static void note(struct call *c, long result)
{
    char line[2 * PATH + 128];
    if (!c->number || log_fd < 0)
        return;
    int n = snprintf(line, sizeof line, "%ld\t%s\t%ld\t%s\t%s\n", c->number, c->name, result, c->path, c->other);
    syscall(SYS_write, log_fd, line, (size_t)n);
}

static int begin(struct call *c)
{
    char wanted[64];
    size_t n = strlen(root);
    c->number = c->hit = 0;
    if (!armed || (strncmp(c->path, root, n) && strncmp(c->other, root, n)))
        return AS_IT_IS;
    snprintf(wanted, sizeof wanted, " %s ", c->name);
    if (*calls && !strstr(calls, wanted))
        return AS_IT_IS;
    if (*part_of_path && !strstr(c->path, part_of_path) && !strstr(c->other, part_of_path))
        return AS_IT_IS;
    c->number = atomic_fetch_add(&counted, 1) + 1;
    if (strcmp(c->name, "fsync") == 0)
        note(c, 0); /* what was written while it ran is not covered by it */
    if (c->number < first || c->number > last || !first)
        return AS_IT_IS;
    c->hit = 1;
    if (is("kill_before"))
        die();
    if (is("signal_before"))
        syscall(SYS_kill, (int)getpid(), (int)argument);
    if (is("stop"))
        syscall(SYS_kill, (int)getpid(), SIGSTOP);
    if (is("fail")) {
        note(c, -1);
        errno = (int)argument;
        return FAIL;
    }
    return is("one_byte") ? ONE_BYTE : is("half") ? HALF : is("end") ? END : is("kill_torn") ? HALF_THEN_DIE : AS_IT_IS;
}

static long end(struct call *c, long result)
{
    int saved = errno;
    if (strcmp(c->name, "fsync"))
        note(c, result);
    if (c->hit && (is("kill_after") || is("kill_torn")))
        die();
    if (c->hit && is("signal_after"))
        syscall(SYS_kill, (int)getpid(), (int)argument);
    errno = saved;
    return result;
}

static size_t less(int how, size_t n)
{
    if (how == ONE_BYTE && n)
        return 1;
    return (how == HALF || how == HALF_THEN_DIE) && n > 1 ? n / 2 : n;
}

static int opening(int folder, const char *path, int flags, int mode)
{
    struct call c = {.name = flags & (O_WRONLY | O_RDWR | O_CREAT) ? "create" : "open"};
    of_path(folder, path, c.path);
    if (begin(&c) == FAIL)
        return -1;
    return (int)end(&c, syscall(SYS_openat, folder, path, flags, mode));
}

#define MODE(flags)                                                                                                    \
    int mode = 0;                                                                                                      \
    if (flags & (O_CREAT | O_TMPFILE)) {                                                                               \
        va_list rest;                                                                                                  \
        va_start(rest, flags);                                                                                         \
        mode = va_arg(rest, int);                                                                                      \
        va_end(rest);                                                                                                  \
    }

int open(const char *path, int flags, ...) { MODE(flags) return opening(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE(flags) return opening(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE(flags) return opening(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE(flags) return opening(folder, path, flags, mode); }

ssize_t read(int fd, void *into, size_t n)
{
    struct call c = {.name = "read"};
    of_fd(fd, c.path);
    int how = begin(&c);
    if (how == FAIL)
        return -1;
    return end(&c, how == END ? 0 : syscall(SYS_read, fd, into, less(how, n)));
}

static ssize_t reading(int fd, void *into, size_t n, off_t offset)
{
    struct call c = {.name = "pread"};
    of_fd(fd, c.path);
    int how = begin(&c);
    if (how == FAIL)
        return -1;
    return end(&c, how == END ? 0 : syscall(SYS_pread64, fd, into, less(how, n), offset));
}

ssize_t pread(int fd, void *into, size_t n, off_t offset) { return reading(fd, into, n, offset); }
ssize_t pread64(int fd, void *into, size_t n, off_t offset) { return reading(fd, into, n, offset); }

static ssize_t gathering(int fd, const struct iovec *vectors, int count, off_t offset)
{
    if (count == 1)
        return reading(fd, vectors->iov_base, vectors->iov_len, offset);
    return syscall(SYS_preadv, fd, vectors, (long)count, offset, 0L);
}

ssize_t preadv(int fd, const struct iovec *v, int count, off_t offset) { return gathering(fd, v, count, offset); }
ssize_t preadv64(int fd, const struct iovec *v, int count, off_t offset) { return gathering(fd, v, count, offset); }

/* preadv2 is what CPython calls where it knows of it. */
static ssize_t gathering2(int fd, const struct iovec *vectors, int count, off_t offset, int flags)
{
    if (flags == 0)
        return gathering(fd, vectors, count, offset);
    return syscall(SYS_preadv2, fd, vectors, (long)count, offset, 0L, (long)flags);
}

ssize_t preadv2(int fd, const struct iovec *v, int n, off_t offset, int flags)
{
    return gathering2(fd, v, n, offset, flags);
}
ssize_t preadv64v2(int fd, const struct iovec *v, int n, off_t offset, int flags)
{
    return gathering2(fd, v, n, offset, flags);
}

ssize_t write(int fd, const void *from, size_t n)
{
    struct call c = {.name = "write"};
    of_fd(fd, c.path);
    int how = begin(&c);
    if (how == FAIL)
        return -1;
    return end(&c, syscall(SYS_write, fd, from, less(how, n)));
}

static ssize_t writing(int fd, const void *from, size_t n, off_t offset)
{
    struct call c = {.name = "pwrite"};
    of_fd(fd, c.path);
    int how = begin(&c);
    if (how == FAIL)
        return -1;
    return end(&c, syscall(SYS_pwrite64, fd, from, less(how, n), offset));
}

ssize_t pwrite(int fd, const void *from, size_t n, off_t offset) { return writing(fd, from, n, offset); }
ssize_t pwrite64(int fd, const void *from, size_t n, off_t offset) { return writing(fd, from, n, offset); }

/* Of the ioctls only FICLONERANGE counts: one file shares blocks with another. */
int ioctl(int fd, unsigned long request, ...)
{
    va_list rest;
    va_start(rest, request);
    void *argument_ = va_arg(rest, void *);
    va_end(rest);
    struct call c = {.name = "clone"};
    if (request != FICLONERANGE)
        return (int)syscall(SYS_ioctl, fd, request, argument_);
    of_fd(fd, c.path);
    of_fd((int)((struct file_clone_range *)argument_)->src_fd, c.other);
    if (begin(&c) == FAIL)
        return -1;
    return (int)end(&c, syscall(SYS_ioctl, fd, request, argument_));
}

ssize_t copy_file_range(int from, off64_t *start, int fd, off64_t *position, size_t n, unsigned flags)
{
    struct call c = {.name = "copy_range"};
    of_fd(fd, c.path);
    of_fd(from, c.other);
    int how = begin(&c);
    if (how == FAIL)
        return -1;
    return end(&c, how == END ? 0 : syscall(SYS_copy_file_range, from, start, fd, position, less(how, n), flags));
}

static int flushing(int fd, long number)
{
    struct call c = {.name = "fsync"};
    of_fd(fd, c.path);
    if (begin(&c) == FAIL)
        return -1;
    return (int)end(&c, syscall(number, fd));
}

int fsync(int fd) { return flushing(fd, SYS_fsync); }
int fdatasync(int fd) { return flushing(fd, SYS_fdatasync); }

static int cutting(int fd, off_t length)
{
    struct call c = {.name = "ftruncate"};
    of_fd(fd, c.path);
    if (begin(&c) == FAIL)
        return -1;
    return (int)end(&c, syscall(SYS_ftruncate, fd, length));
}

int ftruncate(int fd, off_t length) { return cutting(fd, length); }
int ftruncate64(int fd, off_t length) { return cutting(fd, length); }

int flock(int fd, int how)
{
    struct call c = {.name = "flock"};
    of_fd(fd, c.path);
    if (begin(&c) == FAIL)
        return -1;
    return (int)end(&c, syscall(SYS_flock, fd, how));
}

int mkdirat(int folder, const char *path, mode_t mode)
{
    struct call c = {.name = "mkdir"};
    of_path(folder, path, c.path);
    if (begin(&c) == FAIL)
        return -1;
    return (int)end(&c, syscall(SYS_mkdirat, folder, path, mode));
}

int mkdir(const char *path, mode_t mode) { return mkdirat(AT_FDCWD, path, mode); }

int unlinkat(int folder, const char *path, int flags)
{
    struct call c = {.name = flags & AT_REMOVEDIR ? "rmdir" : "unlink"};
    of_path(folder, path, c.path);
    if (begin(&c) == FAIL)
        return -1;
    return (int)end(&c, syscall(SYS_unlinkat, folder, path, flags));
}

int unlink(const char *path) { return unlinkat(AT_FDCWD, path, 0); }
int rmdir(const char *path) { return unlinkat(AT_FDCWD, path, AT_REMOVEDIR); }

int renameat2(int from, const char *old, int to, const char *new, unsigned flags)
{
    struct call c = {.name = flags ? "exchange" : "rename"};
    if (flags && no_exchange) {
        errno = EINVAL;
        return -1;
    }
    of_path(from, old, c.path);
    of_path(to, new, c.other);
    if (begin(&c) == FAIL)
        return -1;
    return (int)end(&c, syscall(SYS_renameat2, from, old, to, new, flags));
}

int renameat(int from, const char *old, int to, const char *new) { return renameat2(from, old, to, new, 0); }
int rename(const char *old, const char *new) { return renameat2(AT_FDCWD, old, AT_FDCWD, new, 0); }
