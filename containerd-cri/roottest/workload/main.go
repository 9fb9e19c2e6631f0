// Command workload is the programs that the root tests run in containers: a pause
// process, a counter, processes with a lot of memory, a shell's few commands.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
	"math/rand/v2"
	"net"
	"os"
	"os/signal"
	"strconv"
	"syscall"
	"time"

	"golang.org/x/sys/unix"
)

func main() {
	if len(os.Args) < 2 {
		pause()
		return
	}
	switch os.Args[1] {
	case "pause":
		pause()
	case "serve":
		serve(os.Args[2:])
	case "multipath":
		// A listener that CRIU can not dump.
		var lc net.ListenConfig
		lc.SetMultipathTCP(true)
		_, err := lc.Listen(context.Background(), "tcp", "127.0.0.1:0")
		exitOn(err)
		serve(os.Args[2:])
	case "hub":
		// Keeps connections from elsewhere.
		l, err := net.Listen("unix", os.Args[2])
		exitOn(err)
		go func() {
			for {
				_, err := l.Accept()
				exitOn(err)
			}
		}()
		serve(os.Args[3:])
	case "client":
		_, err := net.Dial("unix", os.Args[2])
		exitOn(err)
		serve(os.Args[3:])
	case "sysv":
		sysv(os.Args[2])
	case "dirty":
		dirty(os.Args[2:])
	case "cat":
		b, err := os.ReadFile(os.Args[2])
		exitOn(err)
		_, err = os.Stdout.Write(b)
		exitOn(err)
	case "ask":
		b, err := ask(os.Args[2], os.Args[3])
		exitOn(err)
		fmt.Println(b)
	default:
		exitOn(fmt.Errorf("unknown command %q", os.Args[1]))
	}
}

func exitOn(err error) {
	if err != nil {
		fmt.Fprintln(os.Stderr, err)
		os.Exit(1)
	}
}

func pause() {
	c := make(chan os.Signal, 1)
	signal.Notify(c, syscall.SIGTERM, syscall.SIGINT)
	<-c
}

// serve keeps state and answers one line per connection on a Unix socket:
// "count" the ticks since the start, "sum" a digest of the memory, "name" the host name,
// "uptime" the milliseconds since the start. It prints every tick to its log.
func serve(args []string) {
	size, err := strconv.Atoi(args[1])
	exitOn(err)
	mem := make([]byte, size<<20)
	for i := 0; i < len(mem); i += 8 {
		v := uint64(i) * 0x9e3779b97f4a7c15
		for k := range 8 {
			mem[i+k] = byte(v >> (8 * k))
		}
	}
	_ = os.Remove(args[0])
	l, err := net.Listen("unix", args[0])
	exitOn(err)
	ticks, started := 0, time.Now()
	requests := make(chan net.Conn)
	go func() {
		for {
			c, err := l.Accept()
			exitOn(err)
			requests <- c
		}
	}()
	tick := time.NewTicker(20 * time.Millisecond)
	for {
		select {
		case <-tick.C:
			ticks++
			fmt.Println("tick", ticks)
			for _, f := range args[2:] {
				exitOn(appendLine(f, ticks))
			}
		case c := <-requests:
			line, _ := bufio.NewReader(c).ReadString('\n')
			switch line {
			case "count\n":
				fmt.Fprintln(c, ticks)
			case "sum\n":
				fmt.Fprintf(c, "%x\n", sha256.Sum256(mem))
			case "name\n":
				name, err := os.Hostname()
				exitOn(err)
				fmt.Fprintln(c, name)
			case "uptime\n":
				fmt.Fprintln(c, time.Since(started).Milliseconds())
			}
			c.Close()
		}
	}
}

func appendLine(file string, n int) error {
	f, err := os.OpenFile(file, os.O_WRONLY|os.O_CREATE|os.O_APPEND, 0o644)
	if err != nil {
		return err
	}
	defer f.Close()
	_, err = fmt.Fprintln(f, n)
	return err
}

func ask(socket, question string) (string, error) {
	c, err := net.Dial("unix", socket)
	if err != nil {
		return "", err
	}
	defer c.Close()
	if err := c.SetDeadline(time.Now().Add(30 * time.Second)); err != nil {
		return "", err
	}
	fmt.Fprintln(c, question)
	s, err := bufio.NewReader(c).ReadString('\n')
	if err != nil {
		return "", err
	}
	return s[:len(s)-1], nil
}

// sysv counts in a segment of System V shared memory and answers with the count.
func sysv(socket string) {
	id, err := unix.SysvShmGet(4711, 4096, unix.IPC_CREAT|0o600)
	exitOn(err)
	mem, err := unix.SysvShmAttach(id, 0, 0)
	exitOn(err)
	_ = os.Remove(socket)
	l, err := net.Listen("unix", socket)
	exitOn(err)
	go func() {
		for {
			c, err := l.Accept()
			exitOn(err)
			fmt.Fprintln(c, binary.LittleEndian.Uint64(mem))
			c.Close()
		}
	}()
	for range time.Tick(10 * time.Millisecond) {
		binary.LittleEndian.PutUint64(mem, binary.LittleEndian.Uint64(mem)+1)
	}
}

// dirty writes all the time: it fills pages of a region in random order with a number
// that only grows, notes the number of each page, and gives mappings back and makes new
// ones. It answers "count" with the number and "check" with "whole" when every page holds
// what was noted. A page of another time than the note is one that a move has lost.
func dirty(args []string) {
	size, err := strconv.Atoi(args[1])
	exitOn(err)
	_ = os.Remove(args[0])
	l, err := net.Listen("unix", args[0])
	exitOn(err)
	requests := make(chan net.Conn)
	go func() {
		for {
			c, err := l.Accept()
			exitOn(err)
			requests <- c
		}
	}()
	const page = 4096
	const extra = 64
	regions := map[int][]byte{0: make([]byte, size<<20)}
	notes := map[int][]uint64{0: make([]uint64, size<<20/page)}
	number := uint64(0)
	write := func(region, i int) {
		number++
		notes[region][i] = number
		b := regions[region][i*page : (i+1)*page]
		for k := 0; k < page; k += 8 {
			binary.LittleEndian.PutUint64(b[k:], number)
		}
	}
	check := func() string {
		for r, mem := range regions {
			for i, want := range notes[r] {
				for k := 0; k < page; k += 8 {
					if got := binary.LittleEndian.Uint64(mem[i*page+k:]); got != want {
						return fmt.Sprintf("page %d of region %d holds %d at %d, not %d", i, r, got, k, want)
					}
				}
			}
		}
		return "whole"
	}
	for i := range notes[0] {
		write(0, i)
	}
	pause := time.NewTicker(5 * time.Millisecond)
	for {
		select {
		case c := <-requests:
			line, _ := bufio.NewReader(c).ReadString('\n')
			if line == "check\n" {
				fmt.Fprintln(c, check())
			} else {
				fmt.Fprintln(c, number)
			}
			c.Close()
		case <-pause.C:
			for range 100 {
				write(0, rand.IntN(len(notes[0])))
			}
			r := 1 + rand.IntN(50)
			if old := regions[r]; old != nil {
				exitOn(unix.Munmap(old))
				delete(regions, r)
				delete(notes, r)
				continue
			}
			mem, err := unix.Mmap(-1, 0, extra*page, unix.PROT_READ|unix.PROT_WRITE, unix.MAP_PRIVATE|unix.MAP_ANON)
			exitOn(err)
			regions[r], notes[r] = mem, make([]uint64, extra)
			for i := range extra {
				if rand.IntN(2) == 0 { // The others stay what they are: untouched, zero.
					write(r, i)
				}
			}
		}
	}
}
