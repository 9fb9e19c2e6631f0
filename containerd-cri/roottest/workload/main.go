// Command workload is the programs that the root tests run in containers: a pause
// process, a counter, a process with a lot of memory, a shell's few commands.
package main

import (
	"bufio"
	"context"
	"crypto/sha256"
	"encoding/binary"
	"fmt"
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
	case "sysv":
		sysv(os.Args[2])
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
// "count" the ticks since the start, "sum" a digest of the memory, "add FILE" appends
// the count to a file, "pid" the process. It prints every tick to its log.
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
